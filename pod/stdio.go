package pod

import (
	"io"
	"os"
	"sync"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/pod/streaming"
)

// stdio moves bytes between a client's streams and the files of a process.
type stdio struct {
	client *streaming.Client

	console               *os.File // a terminal: both directions
	stdin, stdout, stderr *os.File // our ends of pipes
	outputs               sync.WaitGroup
}

// pipes makes our ends, and returns those of the process.
func (x *stdio) pipes() (theirs ctr.Streams, err error) {
	for _, p := range []struct {
		wanted      bool
		weRead      bool
		ours, their **os.File
	}{
		{x.client.Stdin != nil, false, &x.stdin, &theirs.Stdin},
		{x.client.Stdout != nil, true, &x.stdout, &theirs.Stdout},
		{x.client.Stderr != nil, true, &x.stderr, &theirs.Stderr},
	} {
		if !p.wanted {
			continue
		}
		if *p.ours, *p.their, err = newPipe(p.weRead); err != nil {
			closeFiles(theirs.Stdin, theirs.Stdout, theirs.Stderr)
			return ctr.Streams{}, err
		}
	}
	return theirs, nil
}

// terminal takes a second descriptor of the session's console.
func (x *stdio) terminal(console *os.File) (err error) {
	x.console, err = interruptible(console)
	return err
}

// start begins to copy. Input is read until the client's session ends, which may be after the process has ended: what
// nobody takes would hold up the client's other streams. Closing stdin is the half close that the process sees as its
// end.
func (x *stdio) start() {
	input, output := x.stdin, x.stdout
	if x.console != nil {
		input, output = x.console, x.console
	}
	if in := x.client.Stdin; in != nil && input != nil {
		x.client.Go(func() {
			_, _ = io.Copy(input, in) // ends with either side
			closeFiles(x.stdin)
			_, _ = io.Copy(io.Discard, in)
		})
	}
	x.output(x.client.Stdout, output)
	x.output(x.client.Stderr, x.stderr)
}

func (x *stdio) output(w io.Writer, r *os.File) {
	if w == nil || r == nil {
		return
	}
	x.outputs.Go(func() {
		x.client.Guard(func() {
			if err := copyOutput(w, r); err != nil {
				closeFiles(r) // the client takes no more: the process is to see it (SIGPIPE), not to hang
			}
		})
	})
}

// finish waits for the output that the process has left.
func (x *stdio) finish() {
	endOutput(x.console, x.stdout, x.stderr)
	x.outputs.Wait()
}

func (x *stdio) close() { closeFiles(x.console, x.stdin, x.stdout, x.stderr) }
