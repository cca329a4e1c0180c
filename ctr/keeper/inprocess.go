package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// inProcess is the default engine: libcontainer, linked into the keeper.
type inProcess struct {
	keeper *Keeper
	id     string
	dir    string // libcontainer's own of this container
	lc     *libcontainer.Container
	init   *libcontainer.Process
	born   *born // where its processes are made by birth; nil where libcontainer makes them
}

func newInProcess(k *Keeper, id string, spec *specs.Spec) (*inProcess, error) {
	init, err := newProcess(spec.Process)
	if err != nil {
		return nil, err
	}
	init.Init = true
	lc, err := newLibcontainer(k.stateDir(), id, spec)
	if err != nil {
		return nil, err
	}
	return &inProcess{keeper: k, id: id, dir: filepath.Join(k.stateDir(), id), lc: lc, init: init}, nil
}

// loadInProcess finds a container again of which a keeper before has left libcontainer's state.
func loadInProcess(k *Keeper, id string, byBirth bool) (*inProcess, error) {
	lc, err := libcontainer.Load(k.stateDir(), id)
	if err != nil {
		return nil, fmt.Errorf("load container: %w", err)
	}
	e := &inProcess{keeper: k, id: id, dir: filepath.Join(k.stateDir(), id), lc: lc}
	if byBirth {
		err = e.rebear()
	}
	return e, err
}

func (e *inProcess) create(s ends) (child, error) {
	config := e.lc.Config()
	if !plainBirth(&config) {
		return e.launch(e.init, s, e.byLibcontainer)
	}
	c, err := e.launch(e.init, s, func(p *libcontainer.Process) (child, error) { return e.bear(&config, p) })
	if errors.Is(err, errNotPlain) {
		e.keeper.log.Debug("a container is made by libcontainer alone", "container", e.id, "why", err)
		return e.launch(e.init, s, e.byLibcontainer)
	}
	return c, err
}

func (e *inProcess) exec(x execution) (child, error) {
	p, err := newProcess(x.process)
	if err != nil {
		return child{}, err
	}
	if e.born != nil {
		return e.launch(p, x.ends, func(p *libcontainer.Process) (child, error) { return e.bearExec(p, x.cgroup) })
	}
	if x.cgroup != "" {
		p.SubCgroupPaths = map[string]string{"": filepath.Base(x.cgroup)}
	}
	return e.launch(p, x.ends, e.byLibcontainer)
}

// launch has start make a process with these streams.
func (e *inProcess) launch(p *libcontainer.Process, s ends, start func(*libcontainer.Process) (child, error)) (child, error) {
	var console *os.File
	if s.tty {
		var err error
		if console, p.ConsoleSocket, err = consolePair(); err != nil {
			return child{}, err
		}
		defer wire.CloseFiles([]*os.File{console, p.ConsoleSocket})
	} else {
		s.give(p)
	}
	if filter := e.keeper.filters.use(e.lc.Config().Seccomp); filter != nil {
		p.ExtraFiles = []*os.File{filter} // filters.Fd
	}
	c, err := start(p)
	if err != nil {
		return child{}, err
	}
	if s.tty {
		if c.tty, err = receiveConsole(console); err != nil {
			return child{}, errors.Join(err, c.abort())
		}
	}
	return c, nil
}

// byLibcontainer makes a process as libcontainer does.
func (e *inProcess) byLibcontainer(p *libcontainer.Process) (child, error) {
	if err := e.lc.Start(p); err != nil {
		return child{}, err
	}
	pid, err := p.Pid()
	if err != nil {
		return child{}, err
	}
	return child{pid: pid, collect: func() (int, error) {
		state, err := p.Wait()
		if state == nil {
			return lostExitCode, err
		}
		return exitCode(state.Sys().(syscall.WaitStatus)), nil
	}}, nil
}

// give makes the streams the process's own.
func (s stdStreams) give(p *libcontainer.Process) {
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
}

// start is what libcontainer's Exec does, without its thread that stays behind in open(2) where the init process has
// died. The init process waits in its open of a FIFO. Opened for both directions a FIFO never blocks and never ends
// (fifo(7)); the byte that comes is init's word that it has passed.
func (e *inProcess) start(dead <-chan struct{}) error {
	path := filepath.Join(e.dir, "exec.fifo")
	fifo, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer fifo.Close()
	passed, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-dead:
		case <-passed:
		}
		_ = fifo.SetReadDeadline(time.Unix(1, 0)) // closed: the read is over anyway
	}()
	var word [1]byte
	_, err = fifo.Read(word[:])
	close(passed)
	<-watched
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// It is dead. A short program may have come to its end before anybody here read the word that it passed.
		err = control(fifo, func(fd int) error { _, err := unix.Read(fd, word[:]); return err })
	}
	if err != nil {
		return errors.New("its init process is dead")
	}
	return os.Remove(path) // libcontainer takes the FIFO's presence for "created"
}

func (e *inProcess) update(r *specs.LinuxResources) error {
	group, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{CgroupName: e.id, RootlessCgroups: true,
		Spec: &specs.Spec{Linux: &specs.Linux{Resources: r}}}, nil)
	if err != nil {
		return fmt.Errorf("convert resources: %w", errors.Join(err, wire.ErrBadRequest))
	}
	config := e.lc.Config()
	updated := *config.Cgroups
	group.Resources.Devices = updated.Resources.Devices
	updated.Resources = group.Resources
	config.Cgroups = &updated
	if e.born != nil {
		err = e.born.cgroup.Set(updated.Resources) // libcontainer does not know that it runs
	} else {
		err = e.lc.Set(config)
	}
	if err != nil {
		return fmt.Errorf("set resources: %w", err)
	}
	return nil
}

// destroy first has libcontainer look: one that was loaded while it was created counts as that until then, and libcontainer
// kills the init of such a container, by its number, which may be another process's by now.
func (e *inProcess) destroy() error {
	_, _ = e.lc.Status() // where it cannot tell, what it knew counts
	return e.lc.Destroy()
}

// newLibcontainer makes libcontainer's container of a spec; no process exists yet.
func newLibcontainer(stateDir, id string, spec *specs.Spec) (*libcontainer.Container, error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: id, Spec: spec,
		// As uid 0 of a user namespace mounts and ids are as for root, but cgroups may be refused: RootlessCgroups
		// lets a spec without a cgroup path and limits do without.
		RootlessEUID: false, RootlessCgroups: true,
		NoNewKeyring: true, // see LeaveKeyring
	})
	if err != nil {
		return nil, fmt.Errorf("convert spec: %w", err)
	}
	bundle := filepath.Join(stateDir, id) // libcontainer's own directory of the container, which goes with it
	config.Labels = append(config.Labels, "bundle="+bundle)
	c, err := libcontainer.Create(stateDir, id, config)
	if errors.Is(err, libcontainer.ErrExist) {
		err = errors.Join(wire.ErrExists, err)
	}
	if err != nil {
		return nil, fmt.Errorf("prepare container: %w", err)
	}
	if spec.Hooks != nil {
		if err := writeBundle(bundle, spec); err != nil {
			return nil, errors.Join(err, c.Destroy())
		}
	}
	return c, nil
}

// writeBundle gives hooks what they find through the state on their standard input: the container's configuration, in
// which they look for its root. Of labels of one name the last counts, so specconv's, the working directory, does not.
func writeBundle(dir string, spec *specs.Spec) error {
	raw, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode bundle: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

// newProcess converts an OCI process to libcontainer's.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	if p == nil || len(p.Args) == 0 {
		return nil, fmt.Errorf("process has no command: %w", wire.ErrBadRequest)
	}
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile, Label: p.SelinuxLabel,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
		LogLevel: initLogLevel,
	}
	if lp.Cwd == "" {
		lp.Cwd = "/"
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	if s := p.ConsoleSize; s != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(s.Width), uint16(s.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{Bounding: c.Bounding, Effective: c.Effective,
			Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient}
	}
	for _, r := range p.Rlimits {
		kind, ok := wire.Rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("unknown resource limit %q: %w", r.Type, wire.ErrBadRequest)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("convert cpu affinity: %w", errors.Join(err, wire.ErrBadRequest))
	}
	lp.CPUAffinity = affinity
	return lp, nil
}
