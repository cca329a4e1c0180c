package rootless

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/rootless-containers/rootlesskit/v3/pkg/child"
	"github.com/rootless-containers/rootlesskit/v3/pkg/copyup/tmpfssymlink"
	"github.com/rootless-containers/rootlesskit/v3/pkg/network"
	"github.com/rootless-containers/rootlesskit/v3/pkg/parent"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// The environment by which the parent tells the re-executed program that it is the child.
const (
	pipeEnv       = "_CORACLE_CHILD_PIPE"
	activationEnv = "_CORACLE_CHILD_ACTIVATION"
	helperEnv     = "_CORACLE_CHILD_HELPER"
	stateEnv      = "_CORACLE_STATE_DIR"
)

// SupervisorCgroup is the leaf that holds the node's own processes: cgroup v2 lets no process stay in a cgroup
// whose controllers are enabled for its children.
const SupervisorCgroup = "supervisor"

// propagation: mounts of the host arrive in the node, none goes back. The keeper makes / shared again below.
const propagation = "rslave"

// IsChild tells whether this process is the node's child, PID 1 of the new pid namespace.
func IsChild() bool { return os.Getenv(pipeEnv) != "" }

// ParentOptions are the two halves of a network, and whether the node has a delegated cgroup.
type ParentOptions struct {
	Network  network.ParentDriver
	Ports    port.ParentDriver
	Evacuate bool // move every process of this cgroup to its SupervisorCgroup leaf
	Debug    bool
}

// InitRootlesskit makes RootlessKit's state directory and empties it. It comes before the drivers are made, because
// the port driver puts a pipe there.
func (n Node) InitRootlesskit() error {
	if err := parent.InitStateDir(n.RootlesskitDir()); err != nil {
		return fmt.Errorf("make rootlesskit state directory: %w", err)
	}
	if err := os.Chmod(n.RootlesskitDir(), 0o700); err != nil {
		return fmt.Errorf("make rootlesskit state directory private: %w", err)
	}
	return nil
}

// leaveProcesses keeps an eighth of the processes that the user may have out of reach of all that is in the node: the limit
// that a user namespace's maker has then is that of all its processes together, and of the user's others with them (Linux
// 5.14, user_namespaces(7)). So the user can still end a node in which something has forked without end.
func leaveProcesses() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
		return fmt.Errorf("read limit of processes: %w", err)
	}
	if limit.Cur == unix.RLIM_INFINITY {
		return nil
	}
	limit.Cur -= limit.Cur / 8
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
		return fmt.Errorf("set limit of processes: %w", err)
	}
	return nil
}

// RunParent makes the namespaces, starts the child in them and returns when it has ended. Signals that this
// process gets are passed to the child.
func (n Node) RunParent(o ParentOptions) error {
	quiet(o.Debug)
	if err := leaveProcesses(); err != nil {
		return err
	}
	// RootlessKit looks for the network namespace below /proc/PID/root, where an absolute symbolic link on the way would
	// lead out again.
	stateDir, err := filepath.EvalSymlinks(n.RootlesskitDir())
	if err != nil {
		return fmt.Errorf("find rootlesskit state directory: %w", err)
	}
	opt := parent.Opt{
		PipeFDEnvKey: pipeEnv, ChildUseActivationEnvKey: activationEnv,
		StateDir: stateDir, StateDirEnvKey: stateEnv,
		NetworkDriver: o.Network, PortDriver: o.Ports,
		CreatePIDNS: true, CreateCgroupNS: true, CreateUTSNS: true, CreateIPCNS: true,
		DetachNetNS: true, Propagation: propagation, SubidSource: parent.SubidSourceAuto,
	}
	if o.Evacuate {
		opt.EvacuateCgroup2 = SupervisorCgroup
	}
	// RootlessKit's sockets and files are for this user alone. The child has a mask of its own.
	unix.Umask(0o077)
	err = parent.Parent(opt)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == unix.SIGKILL {
			return errors.New("the node's PID 1 was killed")
		}
		return err
	}
	return explainStart(err)
}

// ChildOptions are the other two halves, and the command that the child supervises.
type ChildOptions struct {
	Network network.ChildDriver
	Ports   port.ChildDriver
	CopyUp  []string // directories that become writable tmpfs full of links to what was there
	Command []string
	Debug   bool
}

// RunChild is PID 1 of the node: it finishes the namespaces, runs the command and reaps orphans. It returns when
// the command has ended, and the kernel then kills whatever is left in the pid namespace.
func RunChild(o ChildOptions) error {
	quiet(o.Debug)
	if o.Ports != nil {
		o.Ports = steadfast{o.Ports}
	}
	// Whatever the mask of the shell was: libcontainer gives a container's first process this one, and an exec its own.
	unix.Umask(0o022)
	return child.Child(child.Opt{
		PipeFDEnvKey: pipeEnv, RunActivationHelperEnvKey: helperEnv, ChildUseActivationEnvKey: activationEnv, StateDirEnvKey: stateEnv,
		TargetCmd: o.Command, NetworkDriver: o.Network, PortDriver: o.Ports,
		CopyUpDriver: tmpfssymlink.NewChildDriver(), CopyUpDirs: o.CopyUp,
		DetachNetNS: true, MountProcfs: true, Propagation: propagation, Reaper: true,
	})
}

// steadfast is a port driver, which RootlessKit starts just before the command: from then on PID 1 ends with its command
// and not by a signal. RootlessKit catches signals only as long as the command runs, and the parent may send one at any
// time; and a signal that nobody catches ends a Go program even where the kernel would not (it is a PID 1), with code 2:
// a node that was told to end would seem to have failed.
type steadfast struct{ port.ChildDriver }

func (d steadfast) RunChildDriver(opaque map[string]string, quit <-chan struct{}, detachedNetNSPath string) error {
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	return d.ChildDriver.RunChildDriver(opaque, quit, detachedNetNSPath)
}

// quiet keeps RootlessKit's hints, which speak of its own command line, out of the node's log.
func quiet(debug bool) {
	logrus.SetOutput(os.Stderr)
	logrus.SetLevel(logrus.ErrorLevel)
	if debug {
		logrus.SetLevel(logrus.DebugLevel)
	}
}

// IsUnshare tells whether RootlessKit's child calls this program as its own `unshare`, by argv[0].
func IsUnshare() bool { return os.Args[0] == "unshare" }

// Unshare serves `unshare -n mount --bind /proc/self/ns/net PATH`, the one form that RootlessKit uses to pin a
// detached network namespace: it makes a network namespace and binds it on PATH.
func Unshare(args []string) error {
	const form = "-n mount --bind /proc/self/ns/net"
	if len(args) != 5 || strings.Join(args[:4], " ") != form {
		return fmt.Errorf("unshare %s: only `unshare %s PATH` is served", strings.Join(args, " "), form)
	}
	runtime.LockOSThread() // never unlocked: the thread lives in the new namespace and the process ends with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare network namespace: %w", err)
	}
	if err := unix.Mount("/proc/thread-self/ns/net", args[4], "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind network namespace on %s: %w", args[4], err)
	}
	return nil
}
