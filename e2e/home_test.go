package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
)

// home is what one test's user has: the XDG directories, in a directory whose name is short, because the path of a
// unix socket may have 107 bytes.
type home struct {
	t      *testing.T
	dir    string
	env    []string
	before world
	ups    int // nodes started so far
}

// upTimeout is for a node to say that it is ready. It takes a fraction of a second where nothing else runs; an emulated
// machine loads the kernel's modules for the first.
var upTimeout = map[bool]time.Duration{false: 30 * time.Second, true: 3 * time.Minute}[vmMode != ""]

func newHome(t *testing.T) *home {
	t.Helper()
	before := observe()
	dir, err := os.MkdirTemp("/tmp", "ce-")
	if err != nil {
		t.Fatal(err)
	}
	h := &home{t: t, dir: dir, before: before}
	for _, sub := range []string{"run", "data", "config", "home", "work"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h.env = []string{"PATH=" + binDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TERM=xterm",
		"HOME=" + h.path("home"), "XDG_RUNTIME_DIR=" + h.path("run"), "XDG_DATA_HOME=" + h.path("data"), "XDG_CONFIG_HOME=" + h.path("config"),
		"USER=" + os.Getenv("USER"), "LOGNAME=" + os.Getenv("USER")}
	t.Cleanup(func() {
		// Files of containers belong to subordinate ids, which only a user namespace may remove.
		if os.RemoveAll(dir) == nil {
			return
		}
		if err := box.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *home) path(elem ...string) string { return filepath.Join(append([]string{h.dir}, elem...)...) }

// write makes a file in the home and returns its path.
func (h *home) write(name, content string) string {
	h.t.Helper()
	path := h.path(name)
	h.writeAt(path, content)
	return path
}

func (h *home) mkdir(elem ...string) string {
	h.t.Helper()
	dir := h.path(elem...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

func (h *home) writeAt(path, content string) {
	h.t.Helper()
	if raw, err := os.ReadFile(path); err == nil && string(raw) == content {
		return // there may be no room to write it again
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// result is how a command ended.
type result struct {
	out, errs string
	code      int
}

// command runs a program to its end in this home.
func (h *home) command(env []string, program string, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(append([]string{}, h.env...), env...)
	cmd.Dir = h.path("work")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	// What a command leaves in the background may hold its output open.
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		h.t.Fatalf("%s %s: did not end\n%s%s", filepath.Base(program), strings.Join(args, " "), out.String(), errs.String())
	}
	if err != nil && cmd.ProcessState == nil {
		h.t.Fatalf("%s: %v", program, err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// coracle runs the program under test.
func (h *home) coracle(args ...string) result {
	h.t.Helper()
	return h.command(nil, filepath.Join(binDir, "coracle"), args...)
}

// node is a coracle in the foreground of a test.
type node struct {
	*home
	name     string
	args     []string // what every coracle command of this node needs
	endpoint string   // as the node printed it
	log      string
	cmd      *exec.Cmd
	ended    chan struct{}
	traces   traces
	clients  []func() // end what talks to the node beside the test
}

var readyLine = regexp.MustCompile(`export CONTAINER_RUNTIME_ENDPOINT=(unix://\S+)`)

// up starts a node and waits until it says that it is ready. The node is taken down when the test ends, and the
// test fails where it has left anything.
func (h *home) up(name string, args ...string) *node {
	h.t.Helper()
	h.ups++
	n := &node{home: h, name: name, log: h.path(fmt.Sprintf("node-%s-%d.log", name, h.ups)), ended: make(chan struct{})}
	if name != "default" {
		n.args = []string{"--name", name}
	}
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	n.cmd = exec.Command(filepath.Join(binDir, "coracle"), append(append([]string{"up"}, n.args...), args...)...)
	n.cmd.Env, n.cmd.Dir, n.cmd.Stdout, n.cmd.Stderr = h.env, h.path("work"), log, log
	// Its own process group: a terminal's interrupt is for the test, which takes the node down.
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() { _ = n.cmd.Wait(); close(n.ended) }()
	h.t.Cleanup(n.cleanUp)
	eventually(h.t, upTimeout, "coracle up says that it is ready", func() error {
		if found := readyLine.FindStringSubmatch(n.logged()); found != nil {
			n.endpoint = found[1]
			return nil
		}
		if n.dead() {
			h.t.Fatalf("coracle up ended: %v\n%s", n.cmd.ProcessState, n.logged())
		}
		return fmt.Errorf("it has logged:\n%s", n.logged())
	})
	n.traces = n.trace()
	return n
}

func (n *node) logged() string {
	raw, err := os.ReadFile(n.log)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func (n *node) logContains(s string) bool { return strings.Contains(n.logged(), s) }

func (n *node) dead() bool {
	select {
	case <-n.ended:
		return true
	default:
		return false
	}
}

// down takes the node down as its user does, and fails the test where anything is left.
func (n *node) down(args ...string) {
	n.t.Helper()
	n.traces = n.trace()
	if r := n.coracle(append(append([]string{"down"}, n.args...), args...)...); r.code != 0 {
		n.t.Errorf("coracle down: exit code %d: %s%s", r.code, r.out, r.errs)
	}
	select {
	case <-n.ended:
		if code := n.cmd.ProcessState.ExitCode(); code != 0 {
			n.t.Errorf("coracle up ended with code %d after coracle down\n%s", code, tail(n.logged(), 20))
		}
	case <-time.After(10 * time.Second):
		n.t.Errorf("coracle up goes on after coracle down has returned")
	}
	n.hangUp()
	n.expectNothingLeft(2 * time.Second)
}

// kill ends the outermost process without ceremony, while clients are connected.
func (n *node) kill() {
	n.t.Helper()
	n.traces = n.trace()
	if err := n.cmd.Process.Kill(); err != nil {
		n.t.Fatal(err)
	}
	<-n.ended
	n.hangUp()
}

func (n *node) hangUp() {
	for _, end := range n.clients {
		end()
	}
	n.clients = nil
}

func (n *node) cleanUp() {
	if n.t.Failed() {
		n.t.Logf("the node's log ends with:\n%s", tail(n.logged(), 60))
	}
	defer func() {
		if n.logContains("WARNING: DATA RACE") { // programs of make race
			n.t.Errorf("the node's log has a data race:\n%s", tail(n.logged(), 80))
		}
	}()
	if n.dead() {
		return
	}
	n.down("--grace", "0s")
	if !n.dead() { // the test has failed already: leave the machine clean nevertheless
		_ = n.cmd.Process.Kill()
		<-n.ended
	}
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}
