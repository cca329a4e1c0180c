package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// fakeKeeper runs containers as ordinary processes: no namespaces and no root filesystem, but real exit codes,
// signals, pipes and terminals.
type fakeKeeper struct {
	mu     sync.Mutex
	boot   int
	procs  map[string]*fakeProc
	events []ctr.Event
	more   chan struct{} // closed and replaced at each event
	fail   map[string]error
	lost   chan struct{} // closed by drop: running Events calls break off
	sizes  map[string][2]uint16
	execs  int // that run
	joined int // attaches that run
	wg     sync.WaitGroup
}

type fakeProc struct {
	req   ctr.CreateRequest
	state ctr.State
	cmd   *exec.Cmd
	stdin io.WriteCloser
	hub   fanout
	done  chan struct{}
	log   *os.File

	limits []*specs.LinuxResources // of each Update
}

// fanout copies output to the log and to whoever is attached.
type fanout struct {
	mu  sync.Mutex
	out []io.Writer
}

func (f *fanout) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.out {
		_, _ = w.Write(p) // who is attached may have gone
	}
	return len(p), nil
}

func (f *fanout) add(w io.Writer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.out = append(f.out, w)
}

func newFakeKeeper() *fakeKeeper {
	return &fakeKeeper{boot: 1, procs: map[string]*fakeProc{}, more: make(chan struct{}), lost: make(chan struct{}), fail: map[string]error{}, sizes: map[string][2]uint16{}}
}

// request is what a container was made of.
func (k *fakeKeeper) request(id string) ctr.CreateRequest {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p := k.procs[id]; p != nil {
		return p.req
	}
	return ctr.CreateRequest{}
}

// failure returns the error that a test wants of op.
func (k *fakeKeeper) failure(op string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fail[op]
}

func (k *fakeKeeper) setFailure(op string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[op] = err
}

// program finds the first argument in the container's root, else on this machine.
func program(req ctr.CreateRequest) (string, error) {
	args := req.Spec.Process.Args
	if path := filepath.Join(req.Spec.Root.Path, args[0]); isFile(path) {
		return path, nil
	}
	return exec.LookPath(args[0])
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func (k *fakeKeeper) Create(_ context.Context, req ctr.CreateRequest) (ctr.State, error) {
	if err := k.failure("create"); err != nil {
		return ctr.State{}, err
	}
	path, err := program(req)
	if err != nil {
		return ctr.State{}, err
	}
	p := &fakeProc{req: req, done: make(chan struct{}), state: ctr.State{ID: req.ID, CreatedAt: time.Now()}}
	p.cmd = exec.Command(path, req.Spec.Process.Args[1:]...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if req.LogPath != "" {
		if p.log, err = openLog(req.LogDir, req.LogPath); err != nil {
			return ctr.State{}, err
		}
		p.hub.add(p.log)
	}
	if req.Stdin {
		if p.stdin, err = p.cmd.StdinPipe(); err != nil {
			return ctr.State{}, err
		}
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.hub, &p.hub
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.procs[req.ID]; ok {
		return ctr.State{}, ctr.ErrExists
	}
	k.procs[req.ID] = p
	return p.state, nil
}

func (k *fakeKeeper) Start(_ context.Context, id string) (ctr.State, error) {
	if err := k.failure("start"); err != nil {
		return ctr.State{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.procs[id]
	if !ok {
		return ctr.State{}, ctr.ErrNotFound
	}
	if err := p.cmd.Start(); err != nil {
		return ctr.State{}, err
	}
	p.state.Pid, p.state.StartedAt = p.cmd.Process.Pid, time.Now()
	p.state.PidStart, _ = startTime(p.state.Pid)
	k.wg.Go(func() { k.reap(p) })
	return p.state, nil
}

func (k *fakeKeeper) reap(p *fakeProc) {
	err := p.cmd.Wait()
	if p.log != nil {
		p.log.Close()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	p.state.FinishedAt, p.state.ExitCode = time.Now(), exitCode(err)
	k.tellLocked(p.state)
	close(p.done)
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return exit.ExitCode()
}

func (k *fakeKeeper) tellLocked(state ctr.State) {
	k.events = append(k.events, ctr.Event{Seq: uint64(len(k.events) + 1), Type: "exit", State: state})
	close(k.more)
	k.more = make(chan struct{})
}

func (k *fakeKeeper) proc(id string) (*fakeProc, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.procs[id]
	if !ok {
		return nil, ctr.ErrNotFound
	}
	return p, nil
}

func (k *fakeKeeper) Kill(_ context.Context, id string, sig syscall.Signal, all bool) error {
	p, err := k.proc(id)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	default:
	}
	pid := p.cmd.Process.Pid
	if all {
		pid = -pid
	}
	if err := syscall.Kill(pid, sig); !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// Update remembers the limits.
func (k *fakeKeeper) Update(_ context.Context, id string, r *specs.LinuxResources) error {
	if err := k.failure("update"); err != nil {
		return err
	}
	p, err := k.proc(id)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if p.state.Exited() {
		return ctr.ErrNotRunning
	}
	p.limits = append(p.limits, r)
	return nil
}

func (k *fakeKeeper) Delete(_ context.Context, id string) error {
	if err := k.failure("delete"); err != nil {
		return err
	}
	p, err := k.proc(id)
	if err != nil {
		return nil
	}
	k.mu.Lock()
	started := p.state.Pid != 0
	k.mu.Unlock()
	if started {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // gone is as good
		<-p.done
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !started { // its init ends, and that is told like any other end
		p.state.FinishedAt, p.state.ExitCode = time.Now(), 137
		k.tellLocked(p.state)
	}
	delete(k.procs, id)
	return nil
}

func (k *fakeKeeper) List(context.Context) ([]ctr.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []ctr.State
	for _, p := range slices.Collect(maps.Values(k.procs)) {
		out = append(out, p.state)
	}
	return out, nil
}

func (k *fakeKeeper) Info(context.Context) (ctr.Info, error) {
	if err := k.failure("info"); err != nil {
		return ctr.Info{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return ctr.Info{Version: "fake", BootID: "boot-" + strconv.Itoa(k.boot), Seq: uint64(len(k.events))}, nil
}

func (k *fakeKeeper) Events(ctx context.Context, since uint64, fn func(ctr.Event) error) error {
	for {
		k.mu.Lock()
		pending, more, lost := k.events[min(since, uint64(len(k.events))):], k.more, k.lost
		k.mu.Unlock()
		for _, e := range pending {
			since = e.Seq
			if err := fn(e); err != nil {
				return err
			}
		}
		select {
		case <-more:
		case <-lost:
			return errors.New("keeper lost")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drop breaks every connection off, as an upgrade of the keeper does.
func (k *fakeKeeper) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.lost)
	k.lost = make(chan struct{})
}

// reboot is the death of the node: every process dies, nobody records it, and a new keeper starts.
func (k *fakeKeeper) reboot() {
	k.mu.Lock()
	procs := k.procs
	k.procs = map[string]*fakeProc{}
	k.boot++
	k.mu.Unlock()
	for _, p := range procs {
		if p.cmd.Process != nil {
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // gone is as good
			<-p.done
		}
	}
	k.mu.Lock()
	k.events = nil
	k.mu.Unlock()
}

func (k *fakeKeeper) ReopenLog(_ context.Context, id, logDir string) error {
	p, err := k.proc(id)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
		return ctr.ErrNotRunning
	default:
	}
	f, err := openLog(logDir, p.req.LogPath)
	if err != nil {
		return err
	}
	return f.Close()
}

// openLog follows no link that leaves dir.
func openLog(dir, path string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name, err := filepath.Rel(dir, path)
	if err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ctr.ErrLogReplaced, err)
	}
	return f, nil
}

func (k *fakeKeeper) Resize(_ context.Context, id string, width, height uint16) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.procs[id]; !ok {
		return ctr.ErrNotFound
	}
	k.sizes[id] = [2]uint16{width, height}
	return nil
}

// sizeOf is the last size that a container's terminal was given.
func (k *fakeKeeper) sizeOf(id string) [2]uint16 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sizes[id]
}

// count adds to a counter of this keeper.
func (k *fakeKeeper) count(counter *int, n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	*counter += n
}

// sessions is how many commands run.
func (k *fakeKeeper) sessions() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.execs
}

// attached is how many clients are attached to containers.
func (k *fakeKeeper) attached() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.joined
}

func (k *fakeKeeper) Attach(ctx context.Context, id string, streams ctr.Streams) error {
	defer closeFiles(streams.Stdin, streams.Stdout, streams.Stderr)
	p, err := k.proc(id)
	if err != nil {
		return err
	}
	if streams.Stdout != nil {
		p.hub.add(streams.Stdout)
	}
	if streams.Stdin != nil && p.stdin != nil {
		go func() {
			_, _ = io.Copy(p.stdin, streams.Stdin)
			if p.req.StdinOnce {
				p.stdin.Close()
			}
		}()
	}
	k.count(&k.joined, 1)
	defer k.count(&k.joined, -1)
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fakeSession is one process of an exec.
type fakeSession struct {
	cmd     *exec.Cmd
	console *os.File
	done    chan struct{}
	code    int
	once    sync.Once
}

func (k *fakeKeeper) Exec(ctx context.Context, req ctr.ExecRequest) (Session, error) {
	defer closeFiles(req.Streams.Stdin, req.Streams.Stdout, req.Streams.Stderr)
	if err := k.failure("exec"); err != nil {
		return nil, err
	}
	if _, err := k.proc(req.ContainerID); err != nil {
		return nil, err
	}
	x := &fakeSession{cmd: exec.Command(req.Process.Args[0], req.Process.Args[1:]...), done: make(chan struct{})}
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: !req.TTY, Setsid: req.TTY, Setctty: req.TTY}
	if req.TTY {
		master, slave, err := openTerminal()
		if err != nil {
			return nil, err
		}
		defer slave.Close()
		x.console = master
		x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = slave, slave, slave
	} else {
		for _, s := range []struct {
			file *os.File
			set  func(*os.File)
		}{
			{req.Streams.Stdin, func(f *os.File) { x.cmd.Stdin = f }},
			{req.Streams.Stdout, func(f *os.File) { x.cmd.Stdout = f }},
			{req.Streams.Stderr, func(f *os.File) { x.cmd.Stderr = f }},
		} {
			if s.file != nil {
				s.set(s.file)
			}
		}
	}
	if err := x.cmd.Start(); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, x.kill)
	k.count(&k.execs, 1)
	k.wg.Go(func() {
		x.code = exitCode(x.cmd.Wait())
		k.count(&k.execs, -1)
		stop()
		close(x.done)
	})
	return x, nil
}

func (x *fakeSession) kill() { _ = syscall.Kill(-x.cmd.Process.Pid, syscall.SIGKILL) }

func (x *fakeSession) Console() *os.File { return x.console }

func (x *fakeSession) Wait(ctx context.Context) (int, error) {
	select {
	case <-x.done:
		return x.code, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (x *fakeSession) Close() error {
	x.once.Do(func() {
		select {
		case <-x.done:
		default:
			x.kill()
			<-x.done
		}
		closeFiles(x.console)
	})
	return nil
}

func openTerminal() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, err
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, nil, errno
	}
	return os.NewFile(uintptr(fd), "ptmx"), os.NewFile(peer, "pts"), nil
}
