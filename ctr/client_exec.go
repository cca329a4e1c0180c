package ctr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// Streams are standard streams to hand over; nil means not wanted. Whoever gets them closes them in any case: the
// caller keeps only the other ends.
type Streams struct {
	Stdin, Stdout, Stderr *os.File
}

func (s Streams) pack() (wire.Streams, []*os.File) {
	var files []*os.File
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f != nil {
			files = append(files, f)
		}
	}
	return wire.Streams{Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil}, files
}

// ExecRequest describes a process to run in a container.
type ExecRequest struct {
	ContainerID string
	Process     *specs.Process
	// TTY gives the process a terminal instead of Streams, which are then nil.
	TTY     bool
	Streams Streams
}

// ExecSession is a process that runs in a container.
type ExecSession struct {
	stream  *stream
	console *os.File
	done    chan struct{} // closed when code and err are set
	code    int
	err     error
	once    sync.Once
}

// Exec starts a process in a running container. The process has the streams' descriptors themselves: reading and
// writing them at the other end is the caller's. A program that cannot be executed is an error here. When ctx ends
// every process of the exec is killed, as by Close.
func (c *Client) Exec(ctx context.Context, r ExecRequest) (*ExecSession, error) {
	streams, files := r.Streams.pack()
	if r.TTY && len(files) > 0 {
		wire.CloseFiles(files)
		return nil, errors.New("exec: a process with a terminal takes no streams")
	}
	s, _, err := c.open(ctx, wire.Request{Op: wire.OpExec, ID: r.ContainerID, Streams: streams,
		Exec: &wire.Exec{Process: r.Process, TTY: r.TTY}}, files...)
	if err != nil {
		return nil, err
	}
	e := &ExecSession{stream: s, done: make(chan struct{})}
	if r.TTY {
		if len(s.files) != 1 {
			s.close()
			return nil, fmt.Errorf("exec: %w: no terminal", errNoAnswer)
		}
		e.console, s.files = s.files[0], nil
	}
	go e.await() // ends with the process or with Close
	return e, nil
}

// await takes the exit code as soon as it comes.
func (e *ExecSession) await() {
	defer close(e.done)
	defer func() {
		if reason := recover(); reason != nil { // who waits knows what to do without a code
			e.err = fmt.Errorf("read exit code of exec: the daemon has a defect: %v\n%s", reason, debug.Stack())
		}
	}()
	reply, err := e.stream.read()
	switch {
	case err != nil:
		e.err = err
	case reply.ExitCode == nil:
		e.err = errNoAnswer
	default:
		e.code = *reply.ExitCode
	}
}

// Console returns the master of the process's terminal, nil without one. It belongs to the session: Close closes
// it, and that hangs the terminal up.
func (e *ExecSession) Console() *os.File { return e.console }

// Wait returns the exit code, 128+n for a death by signal n. It does not wait for the streams' ends, which others
// may hold.
func (e *ExecSession) Wait(ctx context.Context) (int, error) {
	select {
	case <-e.done:
		return e.code, e.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// closeTimeout bounds how long Close waits for the keeper to have killed; it goes on without.
const closeTimeout = 15 * time.Second

// Close ends the session: every process of the exec is killed if its first one still runs, and is dead when Close
// returns. What the first one has left in the background before its own end goes on.
func (e *ExecSession) Close() error {
	e.once.Do(func() {
		_ = e.stream.conn.CloseWrite() // closed already: so is the session
		timer := time.NewTimer(closeTimeout)
		defer timer.Stop()
		select {
		case <-e.done:
		case <-timer.C:
		}
		e.stream.close()
		<-e.done
		if e.console != nil {
			_ = e.console.Close() // a terminal buffers nothing here
		}
	})
	return nil
}

// Attach connects streams to a container's own: its output from now on, its input if it was created with one. It
// returns at the container's exit, when ctx ends, or with an error when the reader at the other end of an output
// stops reading: the keeper queues 1 MiB for it.
func (c *Client) Attach(ctx context.Context, id string, streams Streams) error {
	asked, files := streams.pack()
	s, _, err := c.open(ctx, wire.Request{Op: wire.OpAttach, ID: id, Streams: asked}, files...)
	if err != nil {
		return err
	}
	defer s.close()
	_, err = s.read()
	return err
}
