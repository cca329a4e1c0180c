package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// session is a process executed in a container. The engine makes it the leader of a new kernel session, and it gets
// a cgroup below the container's where there is one: by either its descendants are found.
type session struct {
	keeper *Keeper
	child  child
	leader *process
	cgroup string
	exited chan struct{} // closed when code is set
	code   int
}

// dyingTimeout is how long a failed exec waits for its container to prove dead.
const dyingTimeout = 100 * time.Millisecond

var sessionCount atomic.Uint64

// exec starts a process in a running container. It gets the streams as they are, or a terminal, whose master is
// returned for the caller to close.
func (c *container) exec(req *wire.Exec, streams stdStreams) (_ *session, tty *os.File, err error) {
	if req.Process == nil || len(req.Process.Args) == 0 {
		return nil, nil, fmt.Errorf("process has no command: %w", wire.ErrBadRequest)
	}
	if err := streams.block(); err != nil {
		return nil, nil, err
	}
	c.op.RLock()
	defer c.op.RUnlock()
	if !c.snapshot().Running() {
		return nil, nil, wire.ErrNotRunning
	}
	s := &session{keeper: c.keeper, exited: make(chan struct{})}
	if s.cgroup, err = c.subCgroup(); err != nil {
		return nil, nil, err
	}
	x := execution{process: req.Process, ends: ends{stdStreams: streams, tty: req.TTY}, cgroup: s.cgroup}
	if err := s.start(c, x); err != nil {
		if c.dies(dyingTimeout) {
			err = errors.Join(wire.ErrNotRunning, err)
		}
		return nil, nil, errors.Join(err, s.removeCgroup(true))
	}
	c.sessions.Add(1)
	c.keeper.tasks.Go(func() { defer c.sessions.Done(); s.watch() })
	if c.dies(0) {
		// It may have come in after the container's processes were killed.
		wire.CloseFiles([]*os.File{s.child.tty})
		return nil, nil, errors.Join(wire.ErrNotRunning, s.kill())
	}
	return s, s.child.tty, nil
}

// dies tells whether the container's init process is dead within limit. When a pid namespace ends, the kernel kills
// all others in it before it lets the init process be seen as dead, and waits until they are reaped. So where the keeper
// itself has killed it, there is no hurry.
func (c *container) dies(limit time.Duration) bool {
	if limit > 0 && c.doomed.Load() {
		limit = killTimeout
	}
	return closedWithin(c.dead, limit)
}

// start makes the process and a handle on it. On an error no process is left.
func (s *session) start(c *container, x execution) error {
	since, err := clock()
	if err != nil {
		return err
	}
	c.making.RLock()
	pid, err := c.keeper.children.launch(func() (_ int, err error) {
		s.child, err = c.engine.exec(x)
		return s.child.pid, err
	})
	c.making.RUnlock()
	if err != nil {
		return errors.Join(fmt.Errorf("start process: %w", err), c.endStrays(x.cgroup, since))
	}
	if s.leader, err = openProcess(pid); err != nil {
		c.keeper.children.collect(pid, func() { err = errors.Join(err, s.child.abort()) })
		return err
	}
	return nil
}

// subCgroup makes a cgroup for one exec, so that its end can be everybody's in it.
func (c *container) subCgroup() (string, error) {
	if c.member.cgroup == "" {
		return "", nil
	}
	dir := filepath.Join(c.member.cgroup, fmt.Sprintf("exec-%d", sessionCount.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup of exec: %w", err)
	}
	return dir, nil
}

// removeCgroup leaves a cgroup in which the process has left others behind to the end of the container. Where all have
// been killed it waits for the kernel to be done with them.
func (s *session) removeCgroup(killed bool) error {
	if s.cgroup == "" {
		return nil
	}
	longest := 100 * time.Millisecond
	if killed {
		longest = time.Second
	}
	// The kernel takes a dead task out of its cgroup a moment after it has told its parent, later on a busy machine.
	for pause := 100 * time.Microsecond; ; pause *= 2 {
		err := os.Remove(s.cgroup)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup of exec: %w", err)
		}
		live, rerr := os.ReadFile(filepath.Join(s.cgroup, "cgroup.procs"))
		if !killed && rerr == nil && len(live) > 0 && pause > time.Millisecond {
			return nil
		}
		if pause > longest {
			return fmt.Errorf("remove cgroup of exec: %w", err)
		}
		time.Sleep(pause)
	}
}

// watch waits for the process to end. What it has left in the background goes on, as the caller may have meant.
func (s *session) watch() {
	if err := s.leader.await(); err != nil {
		s.keeper.log.Error("await exec", "pid", s.leader.pid, "error", err)
	}
	s.keeper.swap.ends.enter()
	defer s.keeper.swap.ends.leave()
	s.keeper.children.collect(s.leader.pid, func() {
		var err error
		if s.code, err = s.child.collect(); err != nil {
			s.keeper.log.Error("collect exit status of exec", "pid", s.leader.pid, "error", err)
		}
	})
	s.leader.close()
	close(s.exited)
	if err := s.removeCgroup(false); err != nil {
		s.keeper.log.Error("tidy up after exec", "pid", s.leader.pid, "error", err)
	}
}

// kill ends every process of the exec and waits for that.
func (s *session) kill() error {
	var err error
	if s.child.signal != nil {
		if err = s.child.signal(unix.SIGKILL, true); err != nil && closedWithin(s.exited, endGrace) {
			err = nil
		}
	}
	if s.cgroup != "" {
		err = errors.Join(err, killCgroup(s.cgroup))
	}
	err = errors.Join(err, killUntilNone(s.members, s.keeper.children.reap))
	if err != nil {
		return fmt.Errorf("end exec: %w", err)
	}
	<-s.exited
	return s.removeCgroup(true)
}

// members lists the processes of the exec: itself, its kernel session, and all descendants of these. The session is
// its own, or that of a process of the runtime program which has made it for it. Without a cgroup a daemon that has left
// the session and lost its parent escapes, to end with the container.
func (s *session) members() ([]proc, error) {
	all, err := allProcs()
	if err != nil {
		return nil, err
	}
	pid, session := s.leader.pid, s.leader.session
	for _, p := range all {
		// The number is another's, which the kernel allows when nobody is left in the session.
		if p.pid == s.leader.pid && p.start != s.leader.start {
			pid = 0
		}
		if p.pid == session && p.start > s.leader.start {
			session = 0
		}
	}
	return family(all, func(p proc) bool {
		return pid != 0 && (p.pid == pid || p.session == pid) || session != 0 && p.session == session
	}), nil
}

// stdStreams are the descriptors that came with a request; nil where the caller wants none.
type stdStreams struct {
	stdin, stdout, stderr *os.File
}

func (s stdStreams) close() { wire.CloseFiles([]*os.File{s.stdin, s.stdout, s.stderr}) }

// block sets the ends that Go has made non-blocking back: programs expect of their streams that they block.
func (s stdStreams) block() error {
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if f == nil {
			continue
		}
		if err := control(f, func(fd int) error { return unix.SetNonblock(fd, false) }); err != nil {
			return fmt.Errorf("make stream block: %w", err)
		}
	}
	return nil
}
