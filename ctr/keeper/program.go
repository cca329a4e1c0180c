package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// specVersion is written into config.json: every runtime takes it, and Debian's crun refuses a later one. The spec has
// nothing that needs more.
const specVersion = "1.0.2"

// program is the engine that runs an OCI runtime program: create, start, exec, update and delete are one process each.
// The runtime's state and the bundles lie below RUNTIMEDIR/keeper, and go with the container.
//
// What the program starts is the keeper's child as soon as the program has ended, since the keeper is a subreaper; it
// is waited for like any other. A container in another's sandbox has no such process: see sandboxed.
type program struct {
	keeper  *Keeper
	runtime wire.Runtime
	id      string
	bundle  string
	member  *sandboxed // nil for a container with processes of its own
	cgroup  string     // the directory that the program is told to make; "" where there is none
}

// programOf names the parts of a container of a runtime program.
func (k *Keeper) programOf(id string, runtime wire.Runtime) *program {
	p := &program{keeper: k, runtime: runtime, id: id, bundle: filepath.Join(k.bundleDir(), id)}
	if runtime.Sandbox != "" {
		p.member = &sandboxed{program: p, ended: make(chan struct{})}
	}
	return p
}

func newProgram(k *Keeper, id string, req *wire.Create) (_ *program, err error) {
	p := k.programOf(id, *req.Runtime)
	if err := os.MkdirAll(k.bundleDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make bundle directory: %w", err)
	}
	if err := os.Mkdir(p.bundle, 0o700); err != nil {
		return nil, fmt.Errorf("make bundle: %w", err)
	}
	spec, process := *req.Spec, *req.Spec.Process
	spec.Version, spec.Process, process.Terminal = specVersion, &process, req.TTY
	if linux := *req.Spec.Linux; linux.CgroupsPath != "" {
		// A relative path lies wherever the runtime sees fit; the keeper's lie below the root of the node's tree.
		linux.CgroupsPath = filepath.Join("/", linux.CgroupsPath)
		if p.member != nil {
			linux.CgroupsPath = "" // its processes are in the sandbox's cgroup
		} else if cgroups.IsCgroup2UnifiedMode() {
			p.cgroup = filepath.Join(cgroupRoot, linux.CgroupsPath)
		}
		spec.Linux = &linux
	}
	if err := p.write("config.json", spec); err != nil {
		return nil, errors.Join(err, os.RemoveAll(p.bundle))
	}
	return p, nil
}

func (k *Keeper) bundleDir() string { return filepath.Join(k.recordDir(), "bundles") }

// programState is where the programs keep what they know of their containers.
func (k *Keeper) programState() string { return filepath.Join(k.recordDir(), "oci") }

func (p *program) write(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	if err := os.WriteFile(filepath.Join(p.bundle, name), raw, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func (p *program) create(s ends) (child, error) {
	r := p.prepare("create")
	r.args = append(r.args, "--bundle", p.bundle)
	if r.takes("--no-new-keyring") {
		r.args = append(r.args, "--no-new-keyring") // see LeaveKeyring
	}
	if p.member != nil {
		return p.member.create(r, s)
	}
	c, err := p.spawn(r, s)
	if err != nil && p.cgroup != "" {
		err = errors.Join(err, killCgroup(p.cgroup))
	}
	return c, err
}

func (p *program) exec(x execution) (child, error) {
	r := p.prepare("exec")
	process := *x.process
	process.Terminal = x.ends.tty
	file := r.file("process")
	if err := p.write(filepath.Base(file), process); err != nil {
		return child{}, err
	}
	defer os.Remove(file)
	r.args = append(r.args, "--detach", "--process", file)
	inside := r.file("inside")
	if r.takes("-internal-pid-file") { // gVisor's: the pid in its sandbox
		defer os.Remove(inside)
		r.args = append(r.args, "--internal-pid-file", inside)
	}
	grouped := x.cgroup != "" && r.takes("--cgroup")
	if grouped {
		r.args = append(r.args, "--cgroup", filepath.Base(x.cgroup))
	}
	c, err := p.spawn(r, x.ends)
	if err != nil {
		if pid, rerr := readPid(inside); rerr == nil {
			_ = p.signal(syscall.SIGKILL, "--pid", strconv.Itoa(pid)) // a process in a sandbox, unless it is dead already
		}
		return child{}, err
	}
	if x.cgroup != "" && !grouped {
		// Later than one would like: what the process has forked so far is told by its kernel session alone.
		err = os.WriteFile(filepath.Join(x.cgroup, "cgroup.procs"), strconv.AppendInt(nil, int64(c.pid), 10), 0)
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			return child{}, errors.Join(fmt.Errorf("move process to its cgroup: %w", err), c.abort())
		}
	}
	if pid, err := readPid(inside); err == nil {
		c.inside, c.signal = pid, p.signalInside(pid)
	}
	return c, nil
}

// signalInside signals a process that an exec has made in a sandbox.
func (p *program) signalInside(pid int) func(syscall.Signal, bool) error {
	return func(sig syscall.Signal, _ bool) error { return p.signal(sig, "--pid", strconv.Itoa(pid)) }
}

// spawn runs a command that leaves a process behind, which becomes the keeper's child. On an error the caller ends what
// has got as far as being the container's.
func (p *program) spawn(r *run, s ends) (_ child, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, r.endStrays())
		}
	}()
	file := r.file("pid")
	defer os.Remove(file)
	r.args = append(r.args, "--pid-file", file)
	tty, err := r.withTerminal(s, p.id)
	if err != nil {
		return child{}, err
	}
	pid, err := readPid(file)
	if err == nil {
		var stat proc
		if stat, err = readProc(pid); err == nil && stat.parent != os.Getpid() {
			err = fmt.Errorf("process %d, which it names, is no child of the keeper", pid)
		}
	}
	if err != nil {
		wire.CloseFiles([]*os.File{tty})
		return child{}, fmt.Errorf("run %s: %w", r.name(), err)
	}
	return child{pid: pid, collect: waitPid(pid), tty: tty}, nil
}

func readPid(file string) (int, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(raw)))
}

// startGrace is how long a start may go on after the end of the init process: a short program may have come to its end
// before its start is told; and one that died before its start may be waited for by the runtime for ever.
const startGrace = 10 * time.Second

func (p *program) start(dead <-chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	watched := make(chan struct{})
	defer func() { cancel(); <-watched }()
	go func() {
		defer close(watched)
		select {
		case <-dead:
			time.AfterFunc(startGrace, cancel)
		case <-ctx.Done():
		}
	}()
	r := p.prepare("start")
	r.args = append(r.args, p.id)
	if p.member != nil {
		return p.member.start(ctx, r)
	}
	return r.do(ctx)
}

func (p *program) update(resources *specs.LinuxResources) error {
	r := p.prepare("update")
	file := r.file("resources")
	if err := p.write(filepath.Base(file), resources); err != nil {
		return err
	}
	defer os.Remove(file)
	r.args = append(r.args, "--resources", file, p.id)
	return r.do(context.Background())
}

// signal has the program send a signal: to processes that the keeper cannot reach itself.
func (p *program) signal(sig syscall.Signal, options ...string) error {
	r := p.prepare("kill")
	r.args = append(append(r.args, options...), p.id, strconv.Itoa(int(sig)))
	return r.do(context.Background())
}

func (p *program) destroy() error {
	if _, err := os.Stat(p.bundle); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if p.member != nil {
		p.member.close()
	}
	r := p.prepare("delete")
	r.args = append(r.args, "--force", p.id)
	err := r.do(context.Background())
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		// The program has gone. No process is left; its state is.
		p.keeper.log.Warn("container is taken away without its runtime", "container", p.id, "error", err)
		err = os.RemoveAll(filepath.Join(p.keeper.programState(), p.id))
	}
	if err == nil && p.cgroup != "" {
		err = cgroups.RemovePath(p.cgroup) // what a program that was killed does not know any more
	}
	if err != nil {
		return err
	}
	if err := os.RemoveAll(p.bundle); err != nil {
		return fmt.Errorf("remove bundle: %w", err)
	}
	return nil
}
