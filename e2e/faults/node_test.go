package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/e2e/box"
	"github.com/coracle-cri/coracle/e2e/fixture"
)

// node is a node in the foreground of a test, with XDG directories of its own and clients of its CRI.
type node struct {
	t       *testing.T
	dir     string // short: the path of a unix socket may have 107 bytes
	program string
	env     []string
	cmd     *exec.Cmd
	ended   chan struct{}
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
	address string // of the CRI

	foreign map[int]map[string]bool // by process, the ids and points of mounts that are not the node's, see mounts
}

// up starts a node with the programs in bin. When the test ends, the node is taken down.
func up(t *testing.T, bin string, args ...string) *node {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Files of containers belong to subordinate ids, which only a user namespace may remove.
		if os.RemoveAll(dir) != nil {
			if err := box.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		}
	})
	n := &node{t: t, dir: dir, program: filepath.Join(bin, "coracle"), foreign: map[int]map[string]bool{}}
	for _, sub := range []string{"run", "data", "config", "home", "work", "faults"} {
		if err := os.Mkdir(n.path(sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	n.env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=" + n.path("home"),
		"XDG_RUNTIME_DIR=" + n.path("run"), "XDG_DATA_HOME=" + n.path("data"), "XDG_CONFIG_HOME=" + n.path("config"),
		"USER=" + os.Getenv("USER"), "LOGNAME=" + os.Getenv("USER"), "CORACLE_CRASH=" + n.path("faults")}
	n.start(args...)
	return n
}

var readyLine = regexp.MustCompile(`export CONTAINER_RUNTIME_ENDPOINT=(unix://\S+)`)

func (n *node) start(args ...string) {
	n.t.Helper()
	log, err := os.OpenFile(n.path("log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.ended = make(chan struct{})
	n.cmd = exec.Command(n.program, append([]string{"up"}, args...)...)
	n.cmd.Env, n.cmd.Dir, n.cmd.Stdout, n.cmd.Stderr = n.env, n.path("work"), log, log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt is for the test
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() { _ = n.cmd.Wait(); close(n.ended) }()
	n.t.Cleanup(n.down)
	eventually(n.t, "coracle up says that it is ready", func() error {
		if found := readyLine.FindStringSubmatch(n.log()); found != nil {
			n.address = found[1]
			return nil
		}
		select {
		case <-n.ended:
			n.t.Fatalf("coracle up ended: %v\n%s", n.cmd.ProcessState, n.log())
		default:
		}
		return fmt.Errorf("it has logged:\n%s", n.log())
	})
	conn := dial(n.t, n.address)
	n.runtime, n.images = runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
}

// dial makes a client that looks for a daemon that is away every few milliseconds.
func dial(t *testing.T, endpoint string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1, MaxDelay: time.Millisecond}, MinConnectTimeout: time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (n *node) path(elem ...string) string { return filepath.Join(append([]string{n.dir}, elem...)...) }
func (n *node) runtimeDir() string         { return n.path("run", "coracle") }
func (n *node) socket() string             { return filepath.Join(n.runtimeDir(), "coracle.sock") }
func (n *node) dataDir() string            { return n.path("data", "coracle") }

func (n *node) log() string {
	raw, err := os.ReadFile(n.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func (n *node) down() {
	defer func() {
		if strings.Contains(n.log(), "WARNING: DATA RACE") { // programs of make race
			n.t.Errorf("the node's log has a data race:\n%s", n.log())
		}
	}()
	if n.t.Failed() {
		lines := strings.Split(n.log(), "\n")
		n.t.Logf("the node's log ends with:\n%s", strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
	cmd := exec.Command(n.program, "down", "--grace", "0s")
	cmd.Env = n.env
	if out, err := cmd.CombinedOutput(); err != nil {
		n.t.Errorf("coracle down: %v: %s", err, out)
		_ = n.cmd.Process.Kill()
	}
	<-n.ended
}

// enter runs a command in the node's namespaces and returns its output.
func (n *node) enter(command ...string) (string, error) {
	cmd := exec.Command(n.program, append([]string{"enter", "--"}, command...)...)
	cmd.Env = n.env
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, errs.String())
	}
	return string(out), nil
}

// context bounds the calls of a test.
func (n *node) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	n.t.Cleanup(cancel)
	return ctx
}

// children lists the processes whose parent is pid.
func children(pid int) []int {
	var out []int
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	for _, task := range tasks {
		raw, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for word := range strings.FieldsSeq(string(raw)) {
			if child, err := strconv.Atoi(word); err == nil {
				out = append(out, child)
			}
		}
	}
	return out
}

func cmdline(pid int) []string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
}

var errNoProcess = errors.New("there is no such process now")

// find looks in the tree below pid for the first process that is wanted.
func find(pid int, wanted func(args []string) bool) (int, error) {
	for _, child := range children(pid) {
		if wanted(cmdline(child)) {
			return child, nil
		}
		if found, err := find(child, wanted); err == nil {
			return found, nil
		}
	}
	return 0, errNoProcess
}

// keeper is the pid, outside of the node, of the process that is the parent of all containers.
func (n *node) keeper() (int, error) {
	return find(n.cmd.Process.Pid, func(args []string) bool { return filepath.Base(args[0]) == "coracle-keeper" })
}

// daemon is the pid of the keeper's child that serves the CRI; between two daemons there is none.
func (n *node) daemon() (int, error) {
	keeper, err := n.keeper()
	if err != nil {
		return 0, err
	}
	for _, child := range children(keeper) {
		if args := cmdline(child); len(args) > 1 && filepath.Base(args[0]) == "coracle" && args[1] == "daemon" {
			return child, nil
		}
	}
	return 0, errNoProcess
}

// killDaemon ends the daemon without ceremony, and returns when it has let go of its sockets.
func (n *node) killDaemon() {
	n.t.Helper()
	pid, err := n.daemon()
	if err != nil {
		n.t.Fatalf("find the daemon: %v", err)
	}
	if err := killAndWait(pid); err != nil {
		n.t.Fatalf("kill the daemon: %v", err)
	}
}

// killAndWait returns when the last thread of the process has ended, as a pidfd tells and a zombie does not.
func killAndWait(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// pullBusybox serves the small image on loopback and pulls it.
func (n *node) pullBusybox() string {
	n.t.Helper()
	image := serveBusybox(n.t)
	if _, err := n.images.PullImage(n.context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}}); err != nil {
		n.t.Fatal(err)
	}
	return image
}

// serveBusybox serves the small image on loopback, until the test ends.
func serveBusybox(t *testing.T) string {
	t.Helper()
	registry, err := fixture.StartRegistry(fixture.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	img, err := fixture.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Push(context.Background(), "tests/busybox:1", img); err != nil {
		t.Fatal(err)
	}
	return registry.Addr + "/tests/busybox:1"
}

// podConfig is a pod as a kubelet asks for it. Its logs are in the test's directory.
func (n *node) podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "faults", Uid: "uid-" + name},
		Hostname: name, LogDirectory: n.path("work", "logs", name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}},
	}
}

// containerConfig is a container that runs a shell script.
func containerConfig(name, image, script string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: image},
		Command: []string{"/bin/sh", "-c", script}, LogPath: name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}},
	}
}

// run makes a pod with one container that runs a script, and starts it.
func (n *node) run(name, image, script string) (pod, container string, err error) {
	ctx, config := n.context(), n.podConfig(name)
	sandbox, err := n.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return "", "", err
	}
	created, err := n.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox.PodSandboxId,
		Config: containerConfig("c", image, script), SandboxConfig: config})
	if err != nil {
		return sandbox.PodSandboxId, "", err
	}
	_, err = n.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
	return sandbox.PodSandboxId, created.ContainerId, err
}
