package keeper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// flushTimeout bounds how long a caller may take, after the container's exit, to read what is queued for it.
const flushTimeout = 5 * time.Second

// attachment connects one caller's streams to a container's.
type attachment struct {
	c     *container
	sinks map[*sink]*output
	stdin struct {
		src, dst *os.File
		done     chan struct{}
	}
	cut atomic.Bool // by the keeper: the caller is to attach again
}

// attach connects streams to the container and takes them over. The caller runs wait, then close.
func (c *container) attach(streams stdStreams) (_ *attachment, err error) {
	defer streams.close() // the attachment has duplicates
	if c.stdio == nil || c.snapshot().Exited() {
		return nil, wire.ErrNotRunning
	}
	a := &attachment{c: c, sinks: map[*sink]*output{}}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if err := a.openSink(streams.stdout, c.stdio.stdout); err != nil {
		return nil, err
	}
	if err := a.openSink(streams.stderr, c.stdio.stderr); err != nil {
		return nil, err
	}
	if err := a.openStdin(streams.stdin); err != nil {
		return nil, err
	}
	// Last, so that no line goes to an attachment that does not come about.
	for s, out := range a.sinks {
		out.attach(s)
	}
	return a, nil
}

func (a *attachment) openSink(f *os.File, out *output) error {
	if f == nil || out == nil {
		return nil // not wanted, or no stderr since there is a terminal
	}
	dst, err := pollable(f)
	if err != nil {
		return err
	}
	s := newSink(dst)
	a.sinks[s] = out
	go s.run() // ends with close
	return nil
}

func (a *attachment) openStdin(src *os.File) error {
	if src == nil {
		return nil
	}
	dst, err := a.c.stdio.openStdin()
	if err != nil || dst == nil {
		return err // not open: the caller's end reads as closed
	}
	a.stdin.dst = dst
	if a.stdin.src, err = pollable(src); err != nil {
		return err
	}
	a.stdin.done = make(chan struct{})
	go a.copyStdin() // ends with close
	return nil
}

// copyStdin passes input on until its end, an error or close.
func (a *attachment) copyStdin() {
	defer close(a.stdin.done)
	_, _ = io.Copy(a.stdin.dst, a.stdin.src) // either end may go at any time; both are normal
	if a.c.stdio.once && !a.cut.Load() {
		// CRI, ContainerConfig.stdin_once: stdin is closed once the first attach that had it ends.
		a.c.stdio.closeStdin()
	}
	wire.CloseFiles([]*os.File{a.stdin.src, a.stdin.dst})
}

// wait returns at the container's exit, when the caller is gone, when a reader was too slow, or when the keeper is about
// to be replaced.
func (a *attachment) wait(gone, replaced <-chan struct{}) error {
	slow := make(chan *sink, len(a.sinks))
	for s := range a.sinks {
		go func() { <-s.done; slow <- s }() // ends with close
	}
	for {
		select {
		case <-gone:
			return nil
		case s := <-slow:
			if err := s.failure(); errors.Is(err, errSlowReader) {
				return fmt.Errorf("attach: %w", err)
			}
		case <-a.c.exited:
			a.flush(gone, flushTimeout)
			return nil
		case <-replaced:
			a.cut.Store(true)
			a.flush(gone, sinkPatience)
			return errReplaced
		}
	}
}

// flush lets the caller read what is queued.
func (a *attachment) flush(gone <-chan struct{}, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for s := range a.sinks {
		s.end()
		select {
		case <-s.done:
		case <-gone:
			return
		case <-timer.C:
			return
		}
	}
}

// close cuts the streams off and waits for the goroutines.
func (a *attachment) close() {
	for s, out := range a.sinks {
		out.detach(s)
		s.abort(io.ErrClosedPipe)
		<-s.done
	}
	if a.stdin.dst != nil && a.stdin.done == nil {
		_ = a.stdin.dst.Close() // a duplicate, and nothing was written
	}
	if a.stdin.done != nil {
		past := time.Unix(1, 0)
		_ = a.stdin.src.SetReadDeadline(past)  // closed: the copy has ended
		_ = a.stdin.dst.SetWriteDeadline(past) // likewise
		<-a.stdin.done
	}
}
