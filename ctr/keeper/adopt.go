package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/opencontainers/runc/libcontainer"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// adopted is what was taken over and is not at work yet: nothing may move before it is sure that all can be taken over.
type adopted struct {
	keeper *Keeper    // keeps from the garbage collector what it has taken over so far
	files  []*os.File // descriptors that are of no use once it is at work
	daemon *daemon
	execs  map[*call]*session
	caller *call
}

// adopt takes over what the keeper before has left. On an error the caller goes back; nothing was touched.
func (k *Keeper) adopt(h *Handover) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the keeper made a mistake: %v", p)
		}
	}()
	if err := h.check(); err != nil {
		return err
	}
	k.bootID, k.journal.seq = h.BootID, h.Seq
	sessionCount.Store(h.ExecCount)
	runCount.Store(h.RunCount)
	a := &h.adopted
	a.keeper, a.execs = k, map[*call]*session{}
	a.file(h.Program, "program")
	if err := k.adoptListener(h); err != nil {
		return err
	}
	caller, err := a.connection(h.Caller)
	if err != nil {
		return err
	}
	a.caller = &call{keeper: k, conn: caller, req: wire.Request{Op: wire.OpReplace}}
	for _, hc := range h.Containers {
		if err := k.adoptContainer(hc); err != nil {
			return fmt.Errorf("container %s: %w", hc.State.ID, err)
		}
	}
	for _, x := range h.Execs {
		if err := k.adoptExec(a, x); err != nil {
			return fmt.Errorf("exec in container %s: %w", x.Container, err)
		}
	}
	return k.adoptDaemon(h)
}

// file makes a file of a descriptor; nil of -1.
func (a *adopted) file(fd int, name string) *os.File {
	if fd < 0 {
		return nil
	}
	f := os.NewFile(uintptr(fd), name)
	a.files = append(a.files, f)
	return f
}

func (a *adopted) connection(fd int) (*wire.Conn, error) {
	return wire.ConnOf(a.file(fd, "connection"))
}

func (k *Keeper) adoptListener(h *Handover) error {
	l, err := net.FileListener(h.adopted.file(h.Listener, SocketName))
	if err != nil {
		return fmt.Errorf("take over socket: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return errors.Join(errors.New("take over socket: it is no unix socket"), l.Close())
	}
	u.SetUnlinkOnClose(true)
	k.listener = u
	return nil
}

// adoptProcess takes a child over that nobody has reaped.
func (k *Keeper) adoptProcess(h handedProcess) (*process, error) {
	stat, err := readProc(h.Pid)
	if err == nil && (stat.start != h.Start || stat.parent != os.Getpid()) {
		err = fmt.Errorf("process %d is another one", h.Pid)
	}
	if err != nil {
		return nil, err
	}
	p, err := openProcess(h.Pid)
	if err != nil {
		return nil, err
	}
	p.session = h.Session
	k.children.mu.Lock()
	defer k.children.mu.Unlock()
	k.children.known[h.Pid] = struct{}{}
	return p, nil
}

func (k *Keeper) adoptContainer(h *handedContainer) error {
	c := newContainer(k, h.State.ID)
	c.state, c.seq, c.behind = h.State, h.Seq, h.Behind
	c.doomed.Store(h.Doomed)
	close(c.ready)
	k.containers[c.id] = c
	c.member = membership{ownPID: h.OwnPID, mountNS: h.MountNS, cgroup: h.Cgroup}
	if h.Mounts >= 0 {
		c.member.mounts = os.NewFile(uintptr(h.Mounts), "mounts")
	}
	if h.Stdio != nil {
		c.stdio = adoptStdio(h.Stdio, k)
	}
	c.init = &process{pid: h.State.Pid, start: h.State.PidStart}
	if h.State.Exited() {
		close(c.dead)
		close(c.exited)
	} else {
		if h.Init == nil || h.Stdio == nil || h.Engine == nil {
			return errors.New("it runs, and parts of it are missing")
		}
		var err error
		if c.init, err = k.adoptProcess(*h.Init); err != nil {
			return err
		}
	}
	c.child = child{pid: h.State.Pid, collect: waitPid(h.State.Pid)}
	if h.Engine == nil {
		return nil
	}
	return c.adoptEngine(h.Engine)
}

func (c *container) adoptEngine(h *handedEngine) error {
	k := c.keeper
	if h.Runtime == nil {
		e, err := loadInProcess(k, c.id, h.Born)
		switch {
		case err == nil:
			c.engine = e
		case errors.Is(err, libcontainer.ErrNotExist) && c.state.Exited(): // what there was of it has been taken away
		default:
			// No reason to go back: the keeper of before could not load it either.
			k.log.Error("libcontainer's state of a container cannot be read: nothing more can be executed in it", "container", c.id,
				"path", filepath.Join(k.stateDir(), c.id), "error", err)
			c.engine = &unloaded{dir: filepath.Join(k.stateDir(), c.id), cgroup: h.Cgroup, why: err}
		}
		return nil
	}
	p := k.programOf(c.id, *h.Runtime)
	p.cgroup = h.Cgroup
	c.engine = p
	if p.member == nil {
		return nil
	}
	p.member.started, p.member.standIn = true, c.init
	c.child = p.member.child(c.init.pid)
	if c.state.Exited() {
		close(p.member.ended)
	}
	return nil
}

func adoptStdio(h *handedStdio, k *Keeper) *stdio {
	s := &stdio{once: h.Once}
	if h.Log != nil {
		s.log = &logFile{path: h.Log.Path, log: k.log, file: os.NewFile(uintptr(h.Log.File), h.Log.Path), dropped: h.Log.Dropped, torn: h.Log.Torn}
	}
	if h.TTY >= 0 {
		s.tty = os.NewFile(uintptr(h.TTY), "ptmx")
	}
	switch {
	case h.Stdin >= 0 && h.Stdin == h.TTY:
		s.stdin = s.tty
	case h.Stdin >= 0:
		s.stdin = os.NewFile(uintptr(h.Stdin), "pipe")
	}
	s.stdout = adoptOutput(h.Stdout, s.tty, "stdout", s.log)
	if h.Stderr != nil {
		s.stderr = adoptOutput(h.Stderr, nil, "stderr", s.log)
	}
	return s
}

func adoptOutput(h *handedOutput, tty *os.File, stream string, log *logFile) *output {
	src := tty
	if src == nil && h.Source >= 0 {
		src = os.NewFile(uintptr(h.Source), "pipe")
	}
	o := newOutput(src, stream, log)
	o.format.pending = h.Pending
	if h.Source < 0 {
		o.finished, o.ended = true, true
		close(o.done)
	}
	return o
}

func (k *Keeper) adoptExec(a *adopted, h *handedExec) error {
	c := k.containers[h.Container]
	if c == nil && !h.Exited { // the end of a container that is deleted meanwhile ends its execs
		return wire.ErrNotFound
	}
	conn, err := a.connection(h.Caller)
	if err != nil {
		return err
	}
	s := &session{keeper: k, cgroup: h.Cgroup, exited: make(chan struct{}), code: h.Code,
		child:  child{pid: h.Leader.Pid, collect: waitPid(h.Leader.Pid), inside: h.Inside},
		leader: &process{pid: h.Leader.Pid, start: h.Leader.Start, session: h.Leader.Session}}
	if h.Exited {
		close(s.exited)
	} else {
		if p, ok := c.engine.(*program); ok && h.Inside != 0 {
			s.child.signal = p.signalInside(h.Inside)
		}
		if s.leader, err = k.adoptProcess(h.Leader); err != nil {
			return err
		}
	}
	a.execs[&call{keeper: k, conn: conn, req: wire.Request{Op: wire.OpExec, ID: h.Container}}] = s
	return nil
}

func (k *Keeper) adoptDaemon(h *Handover) error {
	if h.Daemon.Path != "" {
		k.supervisor.program.path = h.Daemon.Path
	}
	if h.Daemon.File >= 0 {
		k.supervisor.program.file = os.NewFile(uintptr(h.Daemon.File), "daemon")
	}
	if h.Daemon.Running == nil {
		return nil
	}
	p, err := k.adoptProcess(*h.Daemon.Running)
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	h.adopted.daemon = &daemon{p: p, ready: make(chan string, 1), ended: make(chan struct{})}
	k.setDaemon(h.adopted.daemon)
	return nil
}

// goOn sets to work what was taken over, and answers who asked for it.
func (k *Keeper) goOn(h *Handover) {
	a := &h.adopted
	for _, c := range k.all() {
		if c.stdio != nil {
			c.stdio.run()
		}
		if c.behind { // nobody else is at work yet who could change it
			k.tasks.Go(c.catchUp)
		}
		if !c.snapshot().Exited() {
			k.tasks.Go(c.watch)
		}
	}
	for x, s := range a.execs {
		if !closedWithin(s.exited, 0) {
			c := k.containers[x.req.ID]
			c.sessions.Add(1)
			k.tasks.Go(func() { defer c.sessions.Done(); s.watch() })
		}
		k.begin(x, func(c *call) (wire.Reply, error) { return c.await(s) })
	}
	if d := a.daemon; d != nil {
		wait := waitStatus(d.p.pid)
		k.watchDaemon(d, func() string {
			status, err := wait()
			if err != nil {
				return err.Error()
			}
			return fmt.Sprintf("exit status %d", exitCode(status))
		})
	}
	wire.CloseFiles(a.files)
	k.log.Info("keeper taken over", "from", h.From, "to", k.cfg.Version, "containers", len(h.Containers), "execs", len(h.Execs), "refused", h.Refused)
	k.begin(a.caller, func(c *call) (wire.Reply, error) {
		if h.Refused != "" {
			return wire.Reply{}, errors.New(h.Refused)
		}
		return c.info(k.callCtx)
	})
	*a = adopted{}
}
