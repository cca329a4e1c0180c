package keeper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/keeper"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

// These tests run a keeper, its client and real containers of a busybox in a user namespace. After each of them
// the descriptors, mounts, child processes and goroutines of this process are what they were before.

func init() { keeper.Init() }

// roleEnv makes this binary, executed again, something else than the tests.
const roleEnv = "CORACLE_TEST_ROLE"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == sandboxesArg {
		exitOn(runSandboxes(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == daemonArg {
		exitOn(runDaemon(os.Args[2]))
	}
	switch os.Getenv(roleEnv) {
	case "keeper":
		exitOn(runKeeper(os.Args[1]))
	case "receiver":
		_, err := keeper.Received()
		exitOn(err)
	case "stranger":
		_, err := ctr.NewClient(os.Args[1]).Info(context.Background())
		exitOn(err)
	default:
		nstest.Main(m)
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// failOnce is a file in the directory of a keeper that makes the one that takes over fail.
const failOnce = "fail-once"

// runKeeper is a keeper in a pid and mount namespace of its own, as on a node: DIR [DAEMON…].
func runKeeper(dir string) error {
	if dir == "--"+keeper.CheckHandoverFlag {
		return keeper.CheckHandover(os.Stdin)
	}
	handover, err := keeper.Received()
	if err != nil {
		return err
	}
	if handover != nil && os.Remove(filepath.Join(dir, failOnce)) == nil {
		return handover.GoBack(errors.New("on purpose"))
	}
	if handover == nil {
		if err := keeper.LeaveKeyring(); err != nil {
			return err
		}
		if os.Getenv(refuseEnv) != "" {
			if err := refuseClone3(); err != nil {
				return err
			}
		}
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("proc", "/proc", "proc", 0, "")); err != nil {
			return err
		}
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := keeper.Prepare(log); err != nil {
		return err
	}
	k, err := keeper.Open(keeper.Config{RuntimeDir: dir, Log: log, Daemon: os.Args[2:], Handover: handover})
	if err != nil && handover != nil {
		return handover.GoBack(err)
	}
	if err != nil {
		return err
	}
	return k.Run(context.Background())
}

// base is a tmpfs of this test binary, in its own mount namespace.
const base = "/tmp/coracle-keeper-test"

// cgroups tells whether /sys/fs/cgroup is a cgroup2 tree in which containers can get cgroups.
var cgroups bool

var prepareOnce = sync.OnceValue(func() error {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	cgroups = mountCgroups() == nil
	root := filepath.Join(base, "rootfs")
	if err := makeRootfs(root); err != nil {
		return err
	}
	// A mount of its own, as an image's is: libcontainer makes the mount that holds the rootfs private in the
	// container, and nothing that lies on the same mount would propagate.
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return keeper.Prepare(slog.New(slog.DiscardHandler))
})

// mountCgroups shows the delegated tree, where these tests were started in one, before libcontainer looks.
func mountCgroups() error {
	const at = "/sys/fs/cgroup"
	if err := unix.Mount("cgroup2", at, "cgroup2", 0, ""); err != nil {
		return err
	}
	probe := filepath.Join(at, "leaf")
	err := os.MkdirAll(probe, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(probe, "cgroup.procs"), []byte("0"), 0)
	}
	if err != nil {
		return errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
	}
	return nil
}

func makeRootfs(root string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return errors.New("these tests need a static busybox: apt-get install busybox-static")
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	for _, dir := range []string{"bin", "proc", "dev", "tmp", "mnt", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755); err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(applets)) {
		if name != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// node is a keeper under test and its client.
type node struct {
	*ctr.Client
	t       *testing.T
	keeper  *keeper.Keeper
	dir     string
	log     *lockedBuffer
	end     func()
	runtime *ctr.Runtime // that of its containers; nil is libcontainer
}

// Create makes a container by the node's runtime, unless the request names one.
func (n *node) Create(ctx context.Context, r ctr.CreateRequest) (ctr.State, error) {
	if r.Runtime == nil {
		r.Runtime = n.runtime
	}
	if inCgroups && r.Spec != nil && r.Spec.Linux != nil && r.Spec.Linux.CgroupsPath == "" {
		r.Spec.Linux.CgroupsPath = "/of-test-" + r.ID
	}
	return n.Client.Create(ctx, r)
}

// newNode starts a keeper; at the end of the test it is stopped, and all must be as it was before.
func newNode(t *testing.T, daemon ...string) *node {
	t.Helper()
	if err := prepareOnce(); err != nil {
		t.Fatal(err)
	}
	before := facts(t)
	dir, err := os.MkdirTemp(base, "n")
	if err != nil {
		t.Fatal(err)
	}
	n := openNode(t, dir, daemon...)
	t.Cleanup(func() {
		n.end()
		if t.Failed() {
			t.Logf("the keeper's log:\n%s", n.log)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		compareFacts(t, before)
	})
	return n
}

// openNode starts a keeper in dir; end stops it.
func openNode(t *testing.T, dir string, daemon ...string) *node {
	t.Helper()
	logs := &lockedBuffer{}
	k, err := keeper.Open(keeper.Config{RuntimeDir: dir, Version: "test", Daemon: daemon,
		Log: slog.New(slog.NewTextHandler(logs, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- k.Run(ctx) }()
	return &node{Client: ctr.NewClient(filepath.Join(dir, keeper.SocketName)), t: t, keeper: k, dir: dir, log: logs, runtime: runtimeOfTests,
		end: sync.OnceFunc(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("end of the keeper: %v", err)
			}
		})}
}

func (n *node) logPath(id string) string { return filepath.Join(n.dir, id+".log") }

func (n *node) create(id string, s *specs.Spec, change ...func(*ctr.CreateRequest)) ctr.State {
	n.t.Helper()
	r := ctr.CreateRequest{ID: id, Spec: s, LogPath: n.logPath(id)}
	for _, c := range change {
		c(&r)
	}
	state, err := n.Create(context.Background(), r)
	if err != nil {
		n.t.Fatal(err)
	}
	return state
}

func (n *node) start(id string) ctr.State {
	n.t.Helper()
	state, err := n.Start(context.Background(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	return state
}

func (n *node) delete(id string) {
	n.t.Helper()
	if err := n.Delete(context.Background(), id); err != nil {
		n.t.Fatal(err)
	}
}

// run runs a container to its end and returns its state.
func (n *node) run(id string, s *specs.Spec, change ...func(*ctr.CreateRequest)) ctr.State {
	n.t.Helper()
	n.create(id, s, change...)
	n.start(id)
	return n.exit(id)
}

// exit waits for the exit event of id.
func (n *node) exit(id string) ctr.State {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	found := errors.New("found")
	var state ctr.State
	err := n.Events(ctx, 0, func(e ctr.Event) error {
		if e.Type == ctr.EventExit && e.State.ID == id {
			state = e.State
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		n.t.Fatalf("await exit of %s: %v", id, err)
	}
	return state
}

func (n *node) state(id string) ctr.State {
	n.t.Helper()
	states, err := n.List(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, s := range states {
		if s.ID == id {
			return s
		}
	}
	n.t.Fatalf("%s is not listed", id)
	return ctr.State{}
}

// lines returns the log's lines without their time stamps.
func (n *node) lines(id string) []string {
	n.t.Helper()
	return logLines(n.t, n.logPath(id))
}

func logLines(t *testing.T, path string) []string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		stamp, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if _, err := time.Parse(time.RFC3339Nano, stamp); err != nil {
			t.Errorf("line %.60q: %v", line, err)
		}
		out = append(out, rest)
	}
	return out
}

// eventually waits until ok, ten seconds at most.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within ten seconds: %s", what)
}

// pipe returns the end to keep and the end to give away.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r, w
}

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	raw, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// lockedBuffer collects the keeper's log.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
