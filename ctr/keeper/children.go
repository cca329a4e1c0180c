package keeper

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children knows which child processes are the keeper's own: the init processes, the processes of exec, the
// daemon. As a subreaper the keeper also becomes the parent of orphans (what a container in the node's pid
// namespace leaves behind, helpers of a daemon that died), and those it reaps.
//
// libcontainer and os/exec wait for short-lived children of which only they know the pid, and an OCI runtime program
// leaves a child to the keeper before it can tell its pid. So no orphan is reaped while a launch is under way: launches
// hold launching for reading, the reaper takes it for writing if it can at once, and is poked by the end of the launch if
// it could not.
type children struct {
	log       *slog.Logger
	launching sync.RWMutex
	skipped   atomic.Bool   // a look was put off
	poke      chan struct{} // capacity 1

	mu      sync.Mutex
	known   map[int]struct{}
	blocked bool // one of known is dead, and dead orphans behind it cannot be seen until it is collected
}

func newChildren(log *slog.Logger) *children {
	return &children{log: log, poke: make(chan struct{}, 1), known: map[int]struct{}{}}
}

// launch runs start, which makes a child and returns its pid, and keeps the reaper away until the pid is known.
func (c *children) launch(start func() (int, error)) (int, error) {
	c.launching.RLock()
	pid, err := start()
	if err == nil {
		c.mu.Lock()
		c.known[pid] = struct{}{}
		c.mu.Unlock()
	}
	c.launching.RUnlock()
	if c.skipped.Load() {
		c.look()
	}
	return pid, err
}

// collect runs wait, which takes the status of an own child that has ended, and forgets the child. Both happen
// under the lock, because the pid is free for another child as soon as the status is taken.
func (c *children) collect(pid int, wait func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait()
	delete(c.known, pid)
	if c.blocked {
		c.blocked = false
		c.look()
	}
}

// runToEnd starts a command that leaves no process behind, and waits for its end.
func (c *children) runToEnd(cmd *exec.Cmd, start func() error) error {
	pid, err := c.launch(func() (int, error) {
		if err := start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	})
	if err != nil {
		return err
	}
	p, err := openProcess(pid)
	if err == nil {
		err = p.await()
		p.close()
	}
	if err != nil {
		_ = cmd.Process.Kill() // nothing can be known of it
	}
	c.collect(pid, func() { err = errors.Join(err, cmd.Wait()) })
	return err
}

// own tells whether pid is one of the keeper's own children.
func (c *children) own(pid int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, own := c.known[pid]
	return own
}

// look makes the reaper look again.
func (c *children) look() {
	select {
	case c.poke <- struct{}{}:
	default:
	}
}

// run reaps orphans until ctx ends.
func (c *children) run(ctx context.Context) {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	defer signal.Stop(died)
	for {
		c.reapDead()
		select {
		case <-died:
		case <-c.poke:
		case <-ctx.Done():
			c.reapOrphans() // the last containers' own
			return
		}
	}
}

// quietly runs reap while no launch is under way; else the end of the launch pokes. A look that panics is told, and the
// next one is as good: it leaves nothing but a zombie, while the end of the keeper would be that of the node.
func (c *children) quietly(reap func()) {
	defer func() {
		if reason := recover(); reason != nil {
			c.log.Error("panic while orphans are reaped", "panic", reason, "stack", string(debug.Stack()))
		}
	}()
	c.skipped.Store(true)
	if !c.launching.TryLock() {
		return
	}
	c.skipped.Store(false)
	defer c.launching.Unlock()
	reap()
}

// reapDead reaps orphans that are dead, as waitid(2) shows them, one at a time and without taking it. It shows the same
// one again, so that where that is an own child it goes on when the child has been collected, which is at once. To list
// all children, as reapOrphans does, costs more with each thread and each container.
func (c *children) reapDead() {
	c.quietly(func() {
		for {
			var dead unix.Siginfo
			err := unix.Waitid(unix.P_ALL, 0, &dead, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT|unix.WALL, nil)
			pid := int(*(*int32)(unsafe.Add(unsafe.Pointer(&dead), siginfoPid)))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || pid == 0 || c.awaits(pid) {
				return // no child, none that is dead, or not ours to take
			}
			c.reap(pid)
		}
	})
}

// siginfoPid is where si_pid is on 64-bit machines: three ints, padding, and then what depends on the signal.
const siginfoPid = 16

// awaits tells whether a dead child is somebody's, whose collecting makes the reaper look again.
func (c *children) awaits(pid int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, own := c.known[pid]
	c.blocked = c.blocked || own
	return own
}

// reapOrphans looks at every child.
func (c *children) reapOrphans() { c.quietly(c.reapAll) }

func (c *children) reapAll() {
	pids, err := childPids()
	if err != nil {
		c.log.Error("find orphans", "error", err)
		return
	}
	for _, pid := range pids {
		c.reap(pid)
	}
}

// reap takes the status of one orphan, if pid is one and has ended.
func (c *children) reap(pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, own := c.known[pid]; own {
		return
	}
	var status unix.WaitStatus
	_, _ = unix.Wait4(pid, &status, unix.WNOHANG|unix.WALL, nil) // lives, is a zombie, or is no child of ours: all fine
}

// childPids lists the direct children of every thread of the keeper.
func childPids() ([]int, error) {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil, err
	}
	if len(lists) == 0 {
		return childPidsByParent() // a kernel without CONFIG_PROC_CHILDREN
	}
	var pids []int
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended; its children went to another one
		}
		for field := range bytes.FieldsSeq(raw) {
			if pid, err := strconv.Atoi(string(field)); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

func childPidsByParent() ([]int, error) {
	all, err := allProcs()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range all {
		if p.parent == os.Getpid() {
			pids = append(pids, p.pid)
		}
	}
	return pids, nil
}
