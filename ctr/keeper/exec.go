package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// session is a process executed in a container. libcontainer makes it the leader of a new kernel session, and it
// gets a cgroup below the container's where there is one: by either its descendants are found.
type session struct {
	keeper *Keeper
	proc   *libcontainer.Process
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
	proc, err := newProcess(req.Process)
	if err != nil {
		return nil, nil, err
	}
	var console *os.File
	if req.TTY {
		if console, proc.ConsoleSocket, err = consolePair(); err != nil {
			return nil, nil, err
		}
		defer wire.CloseFiles([]*os.File{console, proc.ConsoleSocket})
	} else if err := streams.give(proc); err != nil {
		return nil, nil, err
	}

	c.op.RLock()
	defer c.op.RUnlock()
	if !c.snapshot().Running() {
		return nil, nil, wire.ErrNotRunning
	}
	s := &session{keeper: c.keeper, proc: proc, exited: make(chan struct{})}
	if s.cgroup, err = c.subCgroup(proc); err != nil {
		return nil, nil, err
	}
	if err := s.start(c); err != nil {
		if c.dies(dyingTimeout) {
			err = errors.Join(wire.ErrNotRunning, err)
		}
		return nil, nil, errors.Join(err, s.removeCgroup())
	}
	c.sessions.Add(1)
	c.keeper.tasks.Go(func() { defer c.sessions.Done(); s.watch() })
	if c.dies(0) {
		// It may have come in after the container's processes were killed.
		return nil, nil, errors.Join(wire.ErrNotRunning, s.kill())
	}
	if req.TTY {
		if tty, err = receiveConsole(console); err != nil {
			return nil, nil, errors.Join(err, s.kill())
		}
	}
	return s, tty, nil
}

// dies tells whether the container's init process is dead within limit. When a pid namespace ends, the kernel kills
// all others in it before it lets the init process be seen as dead.
func (c *container) dies(limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-c.dead:
		return true
	case <-timer.C:
	}
	select {
	case <-c.dead:
		return true
	default:
		return false
	}
}

// start makes the process and a handle on it.
func (s *session) start(c *container) error {
	pid, err := c.keeper.children.launch(func() (int, error) {
		if err := c.lc.Start(s.proc); err != nil {
			return 0, err
		}
		return s.proc.Pid()
	})
	if err != nil {
		return fmt.Errorf("start process: %w", err)
	}
	if s.leader, err = openProcess(pid); err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // our child, not reaped: the pid is its own
		c.keeper.children.collect(pid, func() { _, _ = s.proc.Wait() })
		return err
	}
	return nil
}

// subCgroup makes a cgroup for one exec, so that its end can be everybody's in it.
func (c *container) subCgroup(proc *libcontainer.Process) (string, error) {
	if c.member.cgroup == "" {
		return "", nil
	}
	name := fmt.Sprintf("exec-%d", sessionCount.Add(1))
	dir := filepath.Join(c.member.cgroup, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup of exec: %w", err)
	}
	proc.SubCgroupPaths = map[string]string{"": name}
	return dir, nil
}

// removeCgroup leaves a cgroup in which the process has left others behind to the end of the container.
func (s *session) removeCgroup() error {
	if s.cgroup == "" {
		return nil
	}
	// The kernel takes a dead task out of its cgroup a moment after it has told its parent.
	for pause := 100 * time.Microsecond; ; pause *= 2 {
		err := os.Remove(s.cgroup)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup of exec: %w", err)
		}
		if live, err := os.ReadFile(filepath.Join(s.cgroup, "cgroup.procs")); err == nil && len(live) > 0 && pause > time.Millisecond {
			return nil
		}
		if pause > 100*time.Millisecond {
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
	s.code = lostExitCode
	s.keeper.children.collect(s.leader.pid, func() {
		if state, err := s.proc.Wait(); state != nil {
			s.code = exitCode(state)
		} else {
			s.keeper.log.Error("collect exit status of exec", "pid", s.leader.pid, "error", err)
		}
	})
	s.leader.close()
	close(s.exited)
	if err := s.removeCgroup(); err != nil {
		s.keeper.log.Error("tidy up after exec", "pid", s.leader.pid, "error", err)
	}
}

// kill ends every process of the exec and waits for that.
func (s *session) kill() error {
	var err error
	if s.cgroup != "" {
		err = killCgroup(s.cgroup)
	}
	err = errors.Join(err, killUntilNone(killTimeout, s.members, s.keeper.children.reap))
	if err != nil {
		return fmt.Errorf("end exec: %w", err)
	}
	<-s.exited
	return s.removeCgroup()
}

// members lists the processes of the exec: itself, its kernel session, and all descendants of these. Without a
// cgroup a daemon that has left the session and lost its parent escapes, to end with the container.
func (s *session) members() ([]proc, error) {
	all, err := allProcs()
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if p.pid == s.leader.pid && p.start != s.leader.start {
			return nil, nil // the number is another's, which the kernel allows when nobody is left in the session
		}
	}
	return family(all, func(p proc) bool { return p.pid == s.leader.pid || p.session == s.leader.pid }), nil
}

// stdStreams are the descriptors that came with a request; nil where the caller wants none.
type stdStreams struct {
	stdin, stdout, stderr *os.File
}

func (s stdStreams) close() { wire.CloseFiles([]*os.File{s.stdin, s.stdout, s.stderr}) }

// give makes the streams the process's own. Programs expect them to block, so the ends that Go has made
// non-blocking are set back.
func (s stdStreams) give(p *libcontainer.Process) error {
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if f == nil {
			continue
		}
		if err := control(f, func(fd int) error { return unix.SetNonblock(fd, false) }); err != nil {
			return fmt.Errorf("make stream block: %w", err)
		}
	}
	// A nil *os.File in an interface would not be nil; nil is /dev/null to libcontainer.
	if s.stdin != nil {
		p.Stdin = s.stdin
	}
	if s.stdout != nil {
		p.Stdout = s.stdout
	}
	if s.stderr != nil {
		p.Stderr = s.stderr
	}
	return nil
}
