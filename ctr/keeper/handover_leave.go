package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// handOver writes down all that the next keeper needs. The caller has frozen everything.
func (k *Keeper) handOver(c *call) (*Handover, error) {
	h := &Handover{Version: handoverVersion(), From: k.cfg.Version, BootID: k.bootID, Seq: k.journal.last(),
		ExecCount: sessionCount.Load(), RunCount: runCount.Load()}
	var err error
	if h.held, err = os.Open("/proc/self/exe"); err != nil {
		return nil, fmt.Errorf("hold this program: %w", err)
	}
	if h.Path, err = os.Executable(); err != nil {
		return nil, errors.Join(fmt.Errorf("find this program: %w", err), h.held.Close())
	}
	errs := []error{nil}
	number := func(f handle) int {
		n, err := numberOf(f)
		errs = append(errs, err)
		return n
	}
	h.Program, h.Listener, h.Caller = number(h.held), number(k.listener), number(c.conn)
	h.Daemon = handedDaemon{Path: k.supervisor.program.path, File: -1}
	if f := k.supervisor.program.file; f != nil {
		h.Daemon.File = number(f)
	}
	k.children.mu.Lock()
	if d := k.supervisor.running; d != nil {
		h.Daemon.Running = d.p.handed()
	}
	k.children.mu.Unlock()
	for _, c := range k.all() {
		if p, ok := c.engine.(*program); ok && p.member != nil && !p.member.handsOver(c) {
			errs = append(errs, fmt.Errorf("container %s is just being started: try again", c.id))
		}
		if e, ok := c.engine.(*inProcess); ok && e.born != nil {
			err := e.born.save(e.dir, e.id, c.init.start)
			if !errors.Is(err, fs.ErrNotExist) || !c.snapshot().Exited() { // else it has been taken away, but for its record
				errs = append(errs, err)
			}
		}
		h.Containers = append(h.Containers, c.handed(number))
	}
	k.swap.guard.Lock()
	defer k.swap.guard.Unlock()
	for c, s := range k.swap.parked {
		h.Execs = append(h.Execs, &handedExec{Container: c.req.ID, Leader: *s.leader.handed(), Caller: number(c.conn), Cgroup: s.cgroup,
			Inside: s.child.inside, Exited: closedWithin(s.exited, 0), Code: s.code})
	}
	return h, errors.Join(errs...)
}

// handle is what has a descriptor.
type handle interface {
	SyscallConn() (syscall.RawConn, error)
}

// numberOf returns the descriptor's number, which counts as long as nobody closes it.
func numberOf(h handle) (int, error) {
	number := -1
	raw, err := h.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { number = int(fd) })
	}
	if err != nil {
		return -1, fmt.Errorf("hand descriptor over: %w", err)
	}
	return number, nil
}

func (p *process) handed() *handedProcess {
	return &handedProcess{Pid: p.pid, Start: p.start, Session: p.session}
}

// handed writes a container down. The caller holds what may change it.
func (c *container) handed(number func(handle) int) *handedContainer {
	h := &handedContainer{State: c.snapshot(), Seq: c.seq, Doomed: c.doomed.Load(), Mounts: -1,
		OwnPID: c.member.ownPID, Behind: c.behind, MountNS: c.member.mountNS, Cgroup: c.member.cgroup}
	if c.init != nil && !h.State.Exited() {
		h.Init = c.init.handed()
	}
	if c.member.mounts != nil {
		h.Mounts = number(c.member.mounts)
	}
	switch e := c.engine.(type) {
	case nil: // of an earlier keeper, or taken away
	case *inProcess:
		h.Engine = &handedEngine{Cgroup: c.member.cgroup, Born: e.born != nil}
	case *unloaded:
		h.Engine = &handedEngine{Cgroup: e.cgroup}
	case *program:
		h.Engine = &handedEngine{Runtime: &e.runtime, Cgroup: e.cgroup}
	}
	if s := c.stdio; s != nil {
		h.Stdio = s.handed(number)
	}
	return h
}

func (s *stdio) handed(number func(handle) int) *handedStdio {
	h := &handedStdio{TTY: -1, Stdin: -1, Once: s.once, Stdout: s.stdout.handed(number)}
	if s.stderr != nil {
		h.Stderr = s.stderr.handed(number)
	}
	if s.tty != nil && h.Stdout.Source >= 0 {
		h.TTY = h.Stdout.Source
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin != nil && (s.stdin != s.tty || h.TTY >= 0) {
		h.Stdin = number(s.stdin)
	}
	if s.log == nil {
		return h
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if s.log.file != nil {
		h.Log = &handedLog{Path: s.log.path, File: number(s.log.file), Dropped: s.log.dropped, Torn: s.log.torn}
	}
	return h
}

func (o *output) handed(number func(handle) int) *handedOutput {
	h := &handedOutput{Source: -1, Pending: o.format.pending}
	if !o.finished {
		h.Source = number(o.src)
	}
	return h
}
