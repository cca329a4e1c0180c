package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// Replacing the keeper.
//
// The keeper is replaced by execve(2): the process stays, and with it its children, the right to wait for them, and its
// descriptors. Its threads do not, wherever they are, so nothing may be in the middle of what cannot be begun again:
//
//	the program that asks        old keeper                                      new keeper
//	        |  replace               |
//	        |----------------------->|  tries the new program on the state that it would get: it may refuse
//	        |                        |  ends attachments; lets calls come to their ends, and recordings of exits
//	        |                        |  holds every log between two chunks; writes all down (Handover)
//	        |                        |  execve ------------------------------------> reads it, takes over
//	        |  Info                  |                                              |
//	        |<----------------------------------------------------------------------|
//
// What comes in meanwhile waits: calls in the listening socket, output in its pipes, dead processes as zombies. Execs go
// on, since only their callers' connections are the keeper's. A new keeper that cannot take over executes the old one.

var (
	errStopping = errors.New("the node is shutting down")
	errSwapping = errors.New("another restart is under way")
	errReplaced = errors.New("the keeper is being replaced by another version; the container goes on: attach again")
)

// replaceTimeout bounds the wait for calls in progress and for exits that are being recorded.
const replaceTimeout = 20 * time.Second

// swap is what a replacement, or a restart of the daemon, needs of the others.
type swap struct {
	mu    sync.Mutex // held by the one that is under way, and by the end of the node
	calls gate       // calls that are at work
	ends  gate       // processes whose status is being taken and recorded

	resting chan struct{} // the accept loop says that it rests
	awake   chan struct{} // and is told to go on

	guard  sync.Mutex
	begun  chan struct{} // closed when attachments are to end
	parked map[*call]*session
}

func newSwap() swap {
	return swap{resting: make(chan struct{}), awake: make(chan struct{}), begun: make(chan struct{}), parked: map[*call]*session{}}
}

// rest is the accept loop's part of a freeze.
func (s *swap) rest() {
	s.resting <- struct{}{}
	<-s.awake
}

// started is closed when a replacement begins.
func (s *swap) started() <-chan struct{} {
	s.guard.Lock()
	defer s.guard.Unlock()
	return s.begun
}

// begin ends the attachments that are and those that come; the function returned lets new ones come.
func (s *swap) begin() func() error {
	s.guard.Lock()
	defer s.guard.Unlock()
	close(s.begun)
	return func() error {
		s.guard.Lock()
		defer s.guard.Unlock()
		s.begun = make(chan struct{})
		return nil
	}
}

// park says that a call only waits for its exec, which another keeper can do as well.
func (s *swap) park(c *call, x *session) {
	s.guard.Lock()
	s.parked[c] = x
	s.guard.Unlock()
	s.calls.leave()
}

func (s *swap) unpark(c *call) {
	s.calls.enter()
	s.guard.Lock()
	defer s.guard.Unlock()
	delete(s.parked, c)
}

// replace executes another program in the place of the keeper. It returns only where that does not come about.
func (k *Keeper) replace(ctx context.Context, c *call) (err error) {
	if !filepath.IsAbs(c.req.Program) {
		return fmt.Errorf("path %q of the program is not absolute: %w", c.req.Program, wire.ErrBadRequest)
	}
	if !k.swap.mu.TryLock() {
		return errSwapping
	}
	defer k.swap.mu.Unlock()
	// What is tried and what is executed are the same file, whatever becomes of the path meanwhile.
	program, err := os.Open(c.req.Program)
	if err != nil {
		return fmt.Errorf("open program: %w", err)
	}
	defer program.Close()
	if err := k.tryHandover(ctx, program, c.req.Program); err != nil {
		return fmt.Errorf("%w; nothing was changed", err)
	}
	k.swap.calls.leave() // else it would wait for itself
	defer k.swap.calls.enter()
	ctx, cancel := context.WithTimeout(ctx, replaceTimeout)
	defer cancel()
	thaw, err := k.freeze(ctx)
	if err != nil {
		return fmt.Errorf("%w; the keeper of before goes on", err)
	}
	defer func() { err = errors.Join(err, thaw()) }()
	if k.stopped.Err() != nil {
		return errStopping
	}
	k.log.Info("the keeper is replaced; containers go on", "program", c.req.Program)
	h, err := k.handOver(c)
	if err == nil {
		err = h.execute(program, c.req.Program)
	}
	return fmt.Errorf("%w; the keeper of before goes on", err)
}

// tryHandover runs the program on the state that it would get.
func (k *Keeper) tryHandover(ctx context.Context, program *os.File, path string) error {
	raw, err := (&Handover{Version: handoverVersion(), From: k.cfg.Version, BootID: k.bootID}).encode()
	if err != nil {
		return err
	}
	var held string
	if err := control(program, func(fd int) error {
		held = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
		return nil
	}); err != nil {
		return err
	}
	args := append([]string{"--" + CheckHandoverFlag}, os.Args[1:]...)
	if err := k.try(ctx, held, raw, args...); err != nil {
		return fmt.Errorf("%s does not take over: %w", path, err)
	}
	return nil
}

// freeze brings everything to where it can be cut off; thaw lets it go on. It is given up when ctx or the node ends.
func (k *Keeper) freeze(ctx context.Context) (thaw func() error, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(k.stopped, func() { cancel(errStopping) })()
	var undo undoStack
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.run())
		}
	}()
	undo.push(k.swap.begin())
	if err := k.listener.SetDeadline(time.Unix(1, 0)); err != nil {
		return nil, fmt.Errorf("hold calls: %w", err)
	}
	<-k.swap.resting
	undo.push(func() error {
		err := k.listener.SetDeadline(time.Time{})
		k.swap.awake <- struct{}{}
		return err
	})
	if err := k.swap.calls.shut(ctx); err != nil {
		return nil, fmt.Errorf("await the end of calls: %w", err)
	}
	undo.push(func() error { k.swap.calls.open(); return nil })
	if err := k.swap.ends.shut(ctx); err != nil {
		return nil, fmt.Errorf("await the recording of exits: %w", err)
	}
	undo.push(func() error { k.swap.ends.open(); return nil })
	for _, c := range k.all() {
		if err := lock(ctx, &c.record); err != nil { // who catches up is not of the calls, and no execve is to cut it off
			return nil, fmt.Errorf("await the record of container %s: %w", c.id, err)
		}
		undo.push(func() error { c.record.Unlock(); return nil })
		if c.stdio == nil {
			continue
		}
		for _, o := range c.stdio.outputs() {
			if err := lock(ctx, &o.passing); err != nil {
				return nil, fmt.Errorf("await the log of container %s: %w", c.id, err)
			}
			undo.push(func() error { o.passing.Unlock(); return nil })
		}
	}
	if err := lock(ctx, &k.children.launching); err != nil {
		return nil, fmt.Errorf("await the start of a process: %w", err)
	}
	undo.push(func() error { k.children.launching.Unlock(); return nil })
	return undo.run, nil
}

// lock locks mu, or returns the cause of ctx's end. Who holds it may be in a write to a filesystem that does not answer,
// and everybody else waits while everything else is frozen.
func lock(ctx context.Context, mu interface {
	sync.Locker
	TryLock() bool
}) error {
	if mu.TryLock() {
		return nil
	}
	locked := make(chan struct{})
	go func() { mu.Lock(); close(locked) }() // ends when whoever holds it lets go
	select {
	case <-locked:
		return nil
	case <-ctx.Done():
		go func() { <-locked; mu.Unlock() }()
		return context.Cause(ctx)
	}
}

// all returns every container in the table.
func (k *Keeper) all() []*container {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]*container, 0, len(k.containers))
	for _, c := range k.containers {
		all = append(all, c)
	}
	return all
}

// execute leaves this program for another one. It returns only on an error, and then all is as before.
func (h *Handover) execute(program *os.File, path string) error {
	raw, err := h.encode()
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("coracle-handover", 0)
	if err != nil {
		return fmt.Errorf("make state file: %w", err)
	}
	state := os.NewFile(uintptr(fd), "handover")
	defer state.Close()
	if _, err := state.Write(raw); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := h.inherit(true); err != nil {
		return errors.Join(err, h.inherit(false))
	}
	args := append([]string{path}, os.Args[1:]...)
	err = control(program, func(held int) error {
		return syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", held), args, append(os.Environ(), fmt.Sprintf("%s=%d", handoverEnv, fd)))
	})
	return errors.Join(fmt.Errorf("execute %s: %w", path, err), h.inherit(false))
}

// inherit lets the descriptors pass through execve(2), or not.
func (h *Handover) inherit(pass bool) error {
	flag := unix.FD_CLOEXEC
	if pass {
		flag = 0
	}
	for _, fd := range h.descriptors() {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flag); err != nil {
			return fmt.Errorf("pass descriptor %d on: %w", fd, err)
		}
	}
	return nil
}
