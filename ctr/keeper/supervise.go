package keeper

import (
	"context"
	"errors"
	"os"
	"time"
)

const (
	// A daemon that was steady is replaced at once; one that was not, after a back-off between these.
	backoffMin = 100 * time.Millisecond
	backoffMax = 800 * time.Millisecond // a node's users wait no longer than about a second, whatever became of its daemon
	// steadyAfter is how long a daemon must have been up for its next end to count as a first one.
	steadyAfter = 10 * time.Second
	// daemonStop bounds how long a daemon may take to end in good order.
	daemonStop = 10 * time.Second
)

// supervisor keeps the daemon running. Its goroutine is superviseDaemon's, which alone reads and changes program; who
// replaces the keeper does so while that goroutine rests, see freeze.
type supervisor struct {
	program  daemonProgram
	args     []string     // after the program's name
	restarts chan restart // taken by the goroutine, whether or not a daemon runs
	running  *daemon      // guarded by children.mu: known processes and this one change together
}

// daemonProgram is what to start the daemon from.
type daemonProgram struct {
	path string
	// file is the program itself where that at path is known to be of no use; nil where path counts.
	file *os.File
}

// superviseDaemon keeps the daemon running until ctx ends, then ends it. States of the supervised process:
//
//	starting ---> up --(it ends, with whatever code)--> waiting --(back-off)--> starting
//	               |--(restart)--> exchanged: stopped, and another program started
//	               '--(ctx ends)--> stopping: SIGTERM, SIGKILL after daemonStop
func (k *Keeper) superviseDaemon(ctx context.Context) {
	s := &k.supervisor
	if s.program.path == "" {
		return
	}
	k.children.mu.Lock()
	d := s.running // that of the keeper before
	k.children.mu.Unlock()
	var wait time.Duration
	for ctx.Err() == nil {
		begun := time.Now()
		var err error
		if d == nil {
			d, err = k.startDaemon(s.program)
		}
		if err == nil {
			err = k.awaitDaemon(ctx, d)
			d = nil
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) >= steadyAfter {
			wait = 0
		}
		k.log.Error("the daemon has ended; containers go on; it is started again",
			"cause", err, "was_up", time.Since(begun).Round(time.Millisecond), "wait", wait)
		select {
		case <-time.After(wait):
		case r := <-s.restarts:
			d, err = k.exchange(nil, r.program)
			r.done <- err
		case <-ctx.Done():
		}
		wait = min(max(2*wait, backoffMin), backoffMax)
	}
}

// awaitDaemon returns how the daemon ended, never nil. One that is exchanged meanwhile is followed by the next.
func (k *Keeper) awaitDaemon(ctx context.Context, d *daemon) error {
	for {
		select {
		case <-d.ended:
			return d.end
		case <-ctx.Done():
			k.stopDaemon(d)
			return d.end
		case r := <-k.supervisor.restarts:
			next, err := k.exchange(d, r.program)
			r.done <- err
			if next == nil {
				return errors.Join(d.end, err)
			}
			d = next
		}
	}
}
