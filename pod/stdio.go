package pod

import (
	"io"
	"os"
	"sync"

	"github.com/coracle-cri/coracle/ctr"
)

// stdio moves bytes between a client's streams and the files of a process. A nil stream was not asked for.
type stdio struct {
	server      *streamServer
	in          io.Reader
	out, errOut io.Writer

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
		{x.in != nil, false, &x.stdin, &theirs.Stdin},
		{x.out != nil, true, &x.stdout, &theirs.Stdout},
		{x.errOut != nil, true, &x.stderr, &theirs.Stderr},
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

// start begins to copy. Input is read until the client closes its stream, which may be after the process has
// ended: that goroutine is the server's. Closing stdin is the half close that the process sees as its end.
func (x *stdio) start() error {
	input, output := x.stdin, x.stdout
	if x.console != nil {
		input, output = x.console, x.console
	}
	if x.in != nil && input != nil {
		if err := x.server.spawn(func() {
			_, _ = io.Copy(input, x.in) // ends with either side
			closeFiles(x.stdin)
		}); err != nil {
			return err
		}
	}
	x.output(x.out, output)
	x.output(x.errOut, x.stderr)
	return nil
}

func (x *stdio) output(w io.Writer, r *os.File) {
	if w == nil || r == nil {
		return
	}
	x.outputs.Go(func() {
		if err := copyOutput(w, r); err != nil {
			closeFiles(r) // the client takes no more: the process is to see it (SIGPIPE), not to hang
		}
	})
}

// finish waits for the output that the process has left.
func (x *stdio) finish() {
	endOutput(x.console, x.stdout, x.stderr)
	x.outputs.Wait()
}

func (x *stdio) close() { closeFiles(x.console, x.stdin, x.stdout, x.stderr) }
