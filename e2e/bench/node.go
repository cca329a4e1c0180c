package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/box"
)

// kind is how a runtime's node is started and ended. One that is given by its socket has none.
type kind struct {
	command func(dir string) *exec.Cmd // runs the node in the foreground
	socket  func(dir string) string
	daemon  func(p process, args []string) bool // whether a process of the node is the one that serves the CRI
	network func(dir string) (pid int)          // a process in the network that the runtime is in; 0 = the host's
	group   string                              // the cgroup that the node makes for itself; "" where it stays in ours
}

// node is a runtime under measurement.
type node struct {
	*client
	name     string
	endpoint string
	kind     *kind
	dir      string
	registry string // host:port where the node finds the registry
	network  int    // a process in the runtime's network namespace; 0 = the host's
	root     int    // the process that all of the node's descend from; 0 = not known
	cmd      *exec.Cmd
	cgroup   string   // that it is started in; "" = none of its own
	counted  []string // those that hold its processes; none: not known
}

// newCoracle is a node of coracle, by programs in a directory.
func newCoracle(programs string) *node {
	const name = "bench"
	return &node{name: "coracle", kind: &kind{
		command: func(dir string) *exec.Cmd {
			cmd := exec.Command(filepath.Join(programs, "coracle"), "up", "--name", name)
			cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_RUNTIME_DIR="+runtimeDir(dir))
			return cmd
		},
		socket: func(dir string) string { return filepath.Join(runtimeDir(dir), "coracle-"+name, "coracle.sock") },
		daemon: func(p process, args []string) bool {
			return p.comm == "coracle" && len(args) > 1 && args[1] == "daemon"
		},
		network: func(string) int { return 0 },
		group:   "coracle-" + name,
	}}
}

// runtimeDir is the user's, which systemd and elogind make on a tmpfs. Where it is on a disk, as in containers that have no
// login, it is one below dir: the peer has its state there too, and its /run on a tmpfs of its own (node.sh).
func runtimeDir(dir string) string {
	own := os.Getenv("XDG_RUNTIME_DIR")
	var fs unix.Statfs_t
	if unix.Statfs(own, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
		return own
	}
	return filepath.Join(dir, "run")
}

// newContainerd is a node of rootless containerd, by what `make peer` has built.
func newContainerd(programs string) *node {
	return &node{name: "containerd", kind: &kind{
		command: func(dir string) *exec.Cmd {
			return exec.Command("e2e/peer/node.sh", programs, dir, peerRegistry+"/bench/pause:1")
		},
		socket: func(dir string) string { return filepath.Join(dir, "cri.sock") },
		daemon: func(p process, _ []string) bool { return p.comm == "containerd" },
		network: func(dir string) int {
			raw, _ := os.ReadFile(filepath.Join(dir, "rootlesskit", "child_pid"))
			pid, _ := strconv.Atoi(strings.TrimSpace(string(raw)))
			return pid
		},
	}}
}

// newSocket is a runtime that somebody else has started: NAME=ENDPOINT, or NAME=ENDPOINT@PID with the process that all
// of the runtime's descend from, in whose network the runtime is.
func newSocket(spec string) (*node, error) {
	name, rest, ok := strings.Cut(spec, "=")
	endpoint, pid, known := strings.Cut(rest, "@")
	n := &node{name: name, endpoint: endpoint}
	if known {
		var err error
		if n.root, err = strconv.Atoi(pid); err != nil {
			return nil, fmt.Errorf("socket %s: %w", spec, err)
		}
		n.network = n.root
	}
	if !ok || endpoint == "" {
		return nil, fmt.Errorf("socket %s: want NAME=ENDPOINT[@PID]", spec)
	}
	return n, nil
}

// start starts the node, in a new directory below dir where it has none yet, and waits for its first answer. It returns how
// long that took, in milliseconds, since before the first program was executed.
func (n *node) start(ctx context.Context, dir string) (ms float64, err error) {
	if n.dir == "" {
		if n.dir, err = os.MkdirTemp(dir, "bench-"); err != nil {
			return 0, err
		}
		if err := os.Mkdir(filepath.Join(n.dir, "run"), 0o700); err != nil {
			return 0, err
		}
	}
	log, err := os.OpenFile(filepath.Join(n.dir, "node.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	n.cmd = n.kind.command(n.dir)
	n.cmd.Stdout, n.cmd.Stderr = log, log
	release, err := n.confine()
	if err != nil {
		return 0, err
	}
	socket := n.kind.socket(n.dir)
	_ = os.Remove(socket)
	began := time.Now()
	err = n.cmd.Start()
	release()
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", n.name, err)
	}
	n.root, n.endpoint = n.cmd.Process.Pid, "unix://"+socket
	if ms, err = n.firstAnswer(ctx, began); err != nil {
		return 0, errors.Join(err, n.stop(), n.tail())
	}
	n.network = n.kind.network(n.dir)
	return ms, n.findGroups()
}

// firstAnswer waits until the runtime answers; the result counts from began, in milliseconds.
func (n *node) firstAnswer(ctx context.Context, began time.Time) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		c, err := net.Dial("unix", socketPath(n.endpoint))
		if err == nil {
			c.Close()
			break
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("%s does not answer: %w", n.name, err)
		}
		time.Sleep(time.Millisecond / 2)
	}
	c, err := dial(n.endpoint, "", "")
	if err != nil {
		return 0, err
	}
	defer c.close()
	if err := c.answers(ctx); err != nil {
		return 0, fmt.Errorf("%s does not answer: %w", n.name, err)
	}
	return since(began), nil
}

// stop ends the node: its first process is asked, and killed after a while.
func (n *node) stop() error {
	if n.cmd == nil {
		return nil
	}
	_ = os.WriteFile(filepath.Join(n.dir, "stop"), nil, 0o600)
	all := tree(n.root)
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(20*time.Second, func() {
		for _, p := range all {
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
	})
	_ = n.cmd.Wait() // ended by a signal
	late.Stop()
	n.cmd = nil
	err := os.Remove(filepath.Join(n.dir, "stop"))
	return errors.Join(err, n.unconfine())
}

// remove removes what the node kept.
func (n *node) remove() error {
	if n.dir == "" {
		return nil
	}
	dir := n.dir
	n.dir = ""
	if os.RemoveAll(dir) == nil {
		return nil
	}
	return box.RemoveAll(dir) // files of subordinate ids
}

// tail is the end of what the node has said, as an error.
func (n *node) tail() error {
	var out string
	for _, f := range []string{"node.log", "log"} {
		raw, _ := os.ReadFile(filepath.Join(n.dir, f))
		out += string(raw[max(0, len(raw)-2000):])
	}
	return errors.New(out)
}

// server is the process that serves the CRI.
func (n *node) server() (process, error) {
	for _, p := range tree(n.root) {
		raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if n.kind.daemon(p, strings.Split(string(raw), "\x00")) {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("%s has no process that serves the CRI", n.name)
}

// inside is a command that runs in the runtime's network, as its clients do.
func (n *node) inside(args ...string) *exec.Cmd {
	self := "/proc/self/exe"
	if n.network == 0 {
		return exec.Command(self, args...)
	}
	if exe, err := os.Executable(); err == nil {
		self = exe
	}
	return exec.Command("nsenter", append([]string{"--preserve-credentials", "-U", "-n", "-t", strconv.Itoa(n.network), "--", self}, args...)...)
}
