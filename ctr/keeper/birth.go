package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/logs"
	"github.com/opencontainers/runc/libcontainer/utils"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// birth makes one process of a container, an init or an exec, in the place of libcontainer's parent half
// (Container.Start). The child's half, in which all of a container's confinement is made, is libcontainer's and the
// same as ever: nsexec and libcontainer.Init. What is gained:
//
//   - An init is born in its cgroup (CLONE_INTO_CGROUP). libcontainer moves it there after the fork, and the kernel lets a
//     process change its cgroup only after a grace period of RCU (cgroup_threadgroup_rwsem): 7–20 ms, of a start of 20.
//     Where the kernel, or the seccomp filter of a container around the node, refuses that, it is moved as libcontainer
//     does it.
//   - The program that the child executes is sealed once, not once a process: see sealedProgram.
//   - No thread that joins the container's mount namespace to open sources of mounts, which only serves where the child
//     cannot see a source itself, and no state.json.
//
// Sound it is because it says to the child what libcontainer would say, in the same order, for the containers that
// plainBirth names; any other goes libcontainer's way, and so does one whose child asks for what is not served here
// (errNotPlain). The conversation is no API: TestTheConversationIsTheOneOfThisVersion fails when the version changes.
//
//	keeper                          child
//	clone3 into the cgroup -------> nsexec: stage 0
//	namespaces -------------------> stage 1, stage 2
//	     <------------------------- the pids of 1 and 2; 0 and 1 end
//	initConfig -------------------> libcontainer.Init
//	     <------------------------- procHooks (an init: the mounts are made)
//	limits; procHooksDone --------> pivot_root, ...
//	     <------------------------- procReady
//	rlimits; procRun -------------> credentials, seccomp
//	     <------------------------- (closed) an init waits at its FIFO, an exec executes
type birth struct {
	config *configs.Config
	said   *initConfig
	cgroup cgroups.Manager // the container's
	into   string          // directory of the cgroup to be born in
	own    bool            // nobody else is in that
	moved  func(why error) // is told where it cannot be born there
	joined map[configs.NamespaceType]string
	flags  uintptr // of namespaces that are new

	cmd        *exec.Cmd
	init, sync *os.File // sockets, the keeper's ends
	log        *os.File // a pipe, the keeper's end
	theirs     []*os.File
	pid        int  // 0 until it is known
	stage0     bool // lives
}

// errNotPlain: the child asks for something that libcontainer's parent half alone can do.
var errNotPlain = errors.New("not a plain container")

// plainBirth tells whether a container can be made in this way.
func plainBirth(c *configs.Config) bool {
	switch {
	case !cgroups.IsCgroup2UnifiedMode() || c.Cgroups == nil || c.Cgroups.Path == "" || c.Cgroups.Systemd || c.Cgroups.Resources.SkipDevices:
		return false // there is no cgroup to be born in
	case len(c.Networks) > 0 || len(c.NetDevices) > 0 || c.IntelRdt != nil || c.TimeOffsets != nil || c.ParentDeathSignal != 0:
		return false
	case c.Namespaces.Contains(configs.NEWUSER) || c.RootlessEUID || c.ExecCPUAffinity != nil:
		return false
	case c.Seccomp != nil && notifies(c.Seccomp):
		return false
	}
	for _, hooks := range c.Hooks {
		if len(hooks) > 0 {
			return false
		}
	}
	for _, m := range c.Mounts {
		if m.IsIDMapped() {
			return false
		}
	}
	return true
}

// run makes the process and returns its pid. On an error no process of it is left.
func (b *birth) run(p *libcontainer.Process, program, fifo *os.File) (pid int, err error) {
	if err := b.prepare(p, program, fifo); err != nil {
		return 0, err
	}
	defer wire.CloseFiles([]*os.File{b.init, b.sync})
	// No descriptor reaches the child unless it is meant to: those that are, are duplicated for it.
	if err := utils.CloseExecFrom(3); err != nil {
		return 0, errors.Join(err, b.log.Close())
	}
	said := logs.ForwardLogs(b.log)
	killed, _ := b.cgroup.OOMKillCount() // no memory controller: none
	if err = b.start(); err == nil {
		err = b.converse()
	}
	if now, _ := b.cgroup.OOMKillCount(); err != nil && now > killed {
		err = fmt.Errorf("%w (an OOM kill: the memory limit may be too low)", err)
	}
	if err != nil {
		err = errors.Join(err, b.abort())
	}
	// The child's half closes its log when it is done, or is dead.
	if logged := <-said; err != nil && logged != nil {
		err = errors.Join(err, fmt.Errorf("runc init error(s): %w", logged))
	}
	return b.pid, err
}

func (b *birth) prepare(p *libcontainer.Process, program, fifo *os.File) (err error) {
	var opened []*os.File
	defer func() {
		if err != nil {
			wire.CloseFiles(opened)
		}
	}()
	pair := func(kind int) (ours, theirs *os.File, err error) {
		fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("make socket to init: %w", err)
		}
		ours, theirs = os.NewFile(uintptr(fds[0]), "init"), os.NewFile(uintptr(fds[1]), "init")
		opened = append(opened, ours, theirs)
		return ours, theirs, nil
	}
	var init, sync, log *os.File
	if b.init, init, err = pair(unix.SOCK_STREAM); err != nil {
		return err
	}
	if b.sync, sync, err = pair(unix.SOCK_SEQPACKET); err != nil {
		return err
	}
	if b.log, log, err = os.Pipe(); err != nil {
		return fmt.Errorf("make log of init: %w", err)
	}
	b.theirs = []*os.File{init, sync, log}

	cmd := exec.Command("/proc/self/exe", "init")
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.Stdin, p.Stdout, p.Stderr
	cmd.Dir = b.config.Rootfs
	cmd.ExtraFiles = append(cmd.ExtraFiles, p.ExtraFiles...)
	kind := "setns"
	if fifo != nil {
		kind = "standard"
	}
	cmd.Env = []string{"GOMAXPROCS=" + os.Getenv("GOMAXPROCS"), "_LIBCONTAINER_INITTYPE=" + kind, "_LIBCONTAINER_LOGLEVEL=" + p.LogLevel}
	for _, passed := range []struct {
		name string
		file *os.File
	}{{"CONSOLE", p.ConsoleSocket}, {"INITPIPE", init}, {"SYNCPIPE", sync}, {"LOGPIPE", log}, {"FIFOFD", fifo}} {
		if passed.file != nil {
			cmd.ExtraFiles = append(cmd.ExtraFiles, passed.file)
			cmd.Env = append(cmd.Env, "_LIBCONTAINER_"+passed.name+"="+strconv.Itoa(2+len(cmd.ExtraFiles)))
		}
	}
	// By its number in the child: syscall.ForkExec renumbers descriptors before it executes.
	cmd.ExtraFiles = append(cmd.ExtraFiles, program)
	cmd.Path = "/proc/self/fd/" + strconv.Itoa(2+len(cmd.ExtraFiles))
	b.cmd = cmd
	return nil
}

// start forks stage 0 into the cgroup. Where that is refused it is moved there, while it waits for the first word and has
// no child.
func (b *birth) start() error {
	defer wire.CloseFiles(b.theirs)
	// O_PATH suffices for clone3(2), and the directory is no way to anything.
	dir, err := cgroups.OpenFile(b.into, "", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open cgroup: %w", err)
	}
	defer dir.Close()
	elsewhere := exec.Cmd{Path: b.cmd.Path, Args: b.cmd.Args, Env: b.cmd.Env, Dir: b.cmd.Dir, Stdin: b.cmd.Stdin, Stdout: b.cmd.Stdout,
		Stderr: b.cmd.Stderr, ExtraFiles: b.cmd.ExtraFiles} // a command is started once
	b.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	refused := b.cmd.Start()
	if refused == nil {
		b.stage0 = true
		return nil
	}
	if !refusesBirth(refused) {
		return fmt.Errorf("start init: %w", refused)
	}
	b.cmd = &elsewhere
	if err := b.cmd.Start(); err != nil {
		return fmt.Errorf("start init: %w", err)
	}
	b.stage0 = true
	if err := cgroups.WriteCgroupProc(b.into, b.cmd.Process.Pid); err != nil {
		return fmt.Errorf("move init to its cgroup: %w (it could not be born there: %w)", err, refused)
	}
	b.moved(refused)
	return nil
}

// refusesBirth tells whether an error may mean that no process can be born in a cgroup: there is no clone3(2) (Linux 5.3),
// or it is filtered; it does not know CLONE_INTO_CGROUP (5.7), to which longer arguments belong; or not for this cgroup.
// Some have other causes too, which meet the second try as well.
func refusesBirth(err error) bool {
	for _, refusal := range []error{unix.ENOSYS, unix.EPERM, unix.EINVAL, unix.E2BIG, unix.EBUSY, unix.EOPNOTSUPP} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return false
}

// converse brings the child to where it needs the keeper no more.
func (b *birth) converse() error {
	// Whatever set of processors the keeper has, the cgroup's counts.
	resetAffinity(b.cmd.Process.Pid)
	if err := b.bear(); err != nil {
		return err
	}
	raw, err := json.Marshal(b.said)
	if err != nil {
		return fmt.Errorf("encode configuration of init: %w", err)
	}
	if _, err := b.init.Write(raw); err != nil {
		return fmt.Errorf("send configuration to init: %w", err)
	}
	ready := false
	for {
		m, err := readSync(b.sync)
		switch {
		case err != nil:
			return fmt.Errorf("error during container init: %w", err)
		case m == nil && !ready:
			return errors.New("error during container init: it ended without a word")
		case m == nil:
			return nil
		}
		switch m.Type {
		case "procHooks":
			err = b.limit()
		case "procReady":
			ready = true
			err = b.ready()
		default:
			err = fmt.Errorf("init asks for %s: %w", m.Type, errNotPlain)
		}
		if err != nil {
			return err
		}
	}
}

// bear has the C half make the init, and waits for the two processes on the way to it.
func (b *birth) bear() error {
	raw, err := bootstrap(b.config, b.flags, b.joined)
	if err != nil {
		return err
	}
	if _, err := b.init.Write(raw); err != nil {
		return fmt.Errorf("send namespaces to init: %w", err)
	}
	first, init, err := readPids(b.init)
	if err != nil {
		return fmt.Errorf("read pid of init: %w", err)
	}
	b.pid = init
	if _, err := waitPid(first)(); err != nil {
		return fmt.Errorf("await init's first process: %w", err)
	}
	b.stage0 = false
	if err := b.cmd.Wait(); err != nil {
		return fmt.Errorf("await init's first process: %w", err)
	}
	return nil
}

func (b *birth) limit() error {
	if err := b.cgroup.Set(b.config.Cgroups.Resources); err != nil {
		return fmt.Errorf("set limits: %w", err)
	}
	return writeSync(b.sync, "procHooksDone")
}

func (b *birth) ready() error {
	for _, limit := range b.said.Rlimits {
		if err := unix.Prlimit(b.pid, limit.Type, &unix.Rlimit{Cur: limit.Soft, Max: limit.Hard}, nil); err != nil {
			return fmt.Errorf("set rlimit %d: %w", limit.Type, err)
		}
	}
	return writeSync(b.sync, "procRun")
}

// abort kills what there is. What stage 0 has made and not told is in the cgroup; the reaper of orphans reaps it.
func (b *birth) abort() error {
	var errs []error
	if b.stage0 {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait() // killed: no success
		if b.pid == 0 && b.own {
			errs = append(errs, killCgroup(b.into))
		}
	}
	if b.pid != 0 {
		_ = unix.Kill(b.pid, unix.SIGKILL)
		_, err := waitPid(b.pid)()
		errs = append(errs, err)
		b.pid = 0
	}
	return errors.Join(errs...)
}

// resetAffinity lets a process run on every processor (sched_setaffinity(2) leaves out those that are not there).
func resetAffinity(pid int) {
	var all [8192]byte
	for i := range all {
		all[i] = 0xff
	}
	// A process that keeps the keeper's set is as good as one that was refused the wider one.
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_SETAFFINITY, uintptr(pid), uintptr(len(all)), uintptr(unsafe.Pointer(&all[0])))
}

// makeFifo makes the FIFO at which an init waits to be started, and opens it without opening it (O_PATH): the child
// opens it by /proc, and gets no descriptor of the directory that it is in.
func makeFifo(dir string) (*os.File, error) {
	path := filepath.Join(dir, "exec.fifo")
	if err := unix.Mkfifo(path, 0o622); err != nil {
		return nil, fmt.Errorf("make FIFO of init: %w", err)
	}
	if err := os.Chmod(path, 0o622); err != nil { // whatever the umask is
		return nil, err
	}
	return os.OpenFile(path, unix.O_PATH|unix.O_CLOEXEC, 0)
}
