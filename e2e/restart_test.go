package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/ctr"
)

// nextDir has the programs of another version, and alien/ those of one whose keeper leaves another kind of state.
var nextDir = os.Getenv("CORACLE_E2E_NEXT")

func needNext(t *testing.T) {
	t.Helper()
	if nextDir == "" {
		t.Skip("CORACLE_E2E_NEXT does not name programs of another version; to run this test: make e2e")
	}
}

// upgrade is a node with containers that would notice a gap.
type upgrade struct {
	*node
	pod, podFile, image string
	counts, ends, reads string
	identity            string
}

func newUpgrade(t *testing.T) *upgrade {
	needNext(t)
	n, image := upWithBusybox(t, "default")
	u := &upgrade{node: n, image: image}
	u.pod, u.podFile = n.runPod("stays", object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": 18215}}})
	n.start(u.pod, u.podFile, "web", image, nil)
	u.counts = n.start(u.pod, u.podFile, "counts", image, shell("i=0; while :; do i=$((i+1)); echo $i; usleep 1000; done"))
	flag := n.mkdir("work", "flag")
	n.writeAt(flag+"/wait", "")
	u.ends = n.start(u.pod, u.podFile, "ends", image, shell("while [ -e /flag/wait ]; do usleep 2000; done; echo last words; exit 7").
		with("mounts", []object{{"host_path": flag, "container_path": "/flag"}}))
	u.reads = n.start(u.pod, u.podFile, "reads", image, object{"stdin": true, "stdin_once": true,
		"command": []string{"/bin/sh", "-c", "while read x; do echo heard $x; done; exit 3"}})
	u.identity = u.whoIs()
	return u
}

// whoIs tells the containers that run from others that would have been started in their place.
func (u *upgrade) whoIs() string {
	return u.exec(u.counts, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22") + " " + u.podIP(u.pod)
}

// letEnd lets one container end, at some moment of what is going on.
func (u *upgrade) letEnd() {
	if err := os.Remove(u.path("work", "flag", "wait")); err != nil {
		u.t.Error(err)
	}
}

// unharmed holds what ran all the while to what it must be.
func (u *upgrade) unharmed() {
	u.t.Helper()
	eventually(u.t, 10*time.Second, "the end of the container that ended meanwhile", func() error {
		s := u.inspect("inspect", u.ends)
		if s.text("exitCode") != "7" || s.text("state") != "CONTAINER_EXITED" || s.text("reason") != "Error" {
			return fmt.Errorf("state %s, exit code %s, reason %s", s.text("state"), s.text("exitCode"), s.text("reason"))
		}
		return nil
	})
	if log := u.crictl("logs", u.ends); log != "last words" {
		u.t.Errorf("its log: %q", log)
	}
	if now := u.whoIs(); now != u.identity {
		u.t.Errorf("%s is now %s", u.identity, now)
	}
	for i, line := range strings.Fields(u.crictl("logs", u.counts)) {
		if line != strconv.Itoa(i+1) {
			u.t.Fatalf("the log has a gap: line %d is %q", i+1, line)
		}
	}
	if r := u.command(nil, "curl", "-fsS", "--max-time", "5", "http://127.0.0.1:18215/"); !strings.Contains(r.out, "hello") {
		u.t.Errorf("the published port: exit code %d %s", r.code, r.errs)
	}
	if s := u.inspect("inspect", u.reads); s.text("state") != "CONTAINER_RUNNING" {
		u.t.Errorf("the container that reads: state %s, exit code %s", s.text("state"), s.text("exitCode"))
	}
}

// leave takes the pod away and the node down: what was begun under one version is ended under another.
func (u *upgrade) leave() {
	u.t.Helper()
	u.crictl("rmp", "--force", u.pod)
	for _, l := range glob(u.t, u.dataDir(), "pods/*", "containers/*", "images/rootfs/*") {
		u.t.Errorf("left behind by rmp: %s", l)
	}
	expectPortFree(u.t, 18215)
	u.down()
}

// client is a crictl that streams.
type client struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	errs bytes.Buffer
}

func (n *node) streams(args ...string) *client {
	n.t.Helper()
	c := &client{t: n.t, cmd: n.crictlCommand(args...)}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	c.in, c.out, c.cmd.Stderr = in, bufio.NewReader(out), &c.errs
	if err := c.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	return c
}

// says types a line and reads one.
func (c *client) says(line, want string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Errorf("%v: %v", c.cmd.Args, err)
	}
	if got, err := c.out.ReadString('\n'); got != want+"\n" {
		c.t.Errorf("%v: to %q came %q, %v; %s", c.cmd.Args, line, got, err, c.errs.String())
	}
}

// ends waits for the client's end, which is an error that it was told.
func (c *client) ends(why string) {
	c.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	_, _ = io.Copy(io.Discard, c.out)
	err := c.cmd.Wait()
	if err == nil || !strings.Contains(c.errs.String(), why) {
		c.t.Errorf("%v ended: %v; it said: %s", c.cmd.Args, err, c.errs.String())
	}
}

// restart runs `coracle restart` of the programs in dir.
func (u *upgrade) restart(dir string, args ...string) result {
	u.t.Helper()
	return u.command(nil, filepath.Join(dir, "coracle"), append([]string{"restart"}, args...)...)
}

func (u *upgrade) runtimeVersion() string { return u.crictl("version") }

// TestRestartDaemon swaps the daemon for one of another version, and back, while everything runs; streams in progress
// are told.
func TestRestartDaemon(t *testing.T) {
	u := newUpgrade(t)
	old := u.daemon()
	if v := u.runtimeVersion(); strings.Contains(v, "-next") {
		t.Fatalf("the version is the other one's already: %s", v)
	}
	shell := u.streams("exec", "-i", u.counts, "sh", "-c", "while read x; do echo you said $x; done")
	shell.says("one", "you said one")
	attached := u.streams("attach", "-i", u.reads)
	attached.says("two", "heard two")
	ended := time.AfterFunc(20*time.Millisecond, u.letEnd)
	r := u.restart(nextDir)
	if r.code != 0 || !strings.Contains(r.out, "-next in place of") {
		t.Fatalf("coracle restart: exit code %d: %s%s", r.code, r.out, r.errs)
	}
	t.Log(strings.TrimSpace(r.out))
	if ended.Stop() {
		u.letEnd()
	}
	shell.ends("the daemon is shutting down")
	attached.ends("the daemon is shutting down")
	if v := u.runtimeVersion(); !strings.Contains(v, "-next") {
		t.Errorf("the version is still the old one's: %s", v)
	}
	if now := u.daemon(); now == old {
		t.Errorf("the daemon is still process %d", old)
	}
	r = u.restart(binDir)
	if v := u.runtimeVersion(); r.code != 0 || strings.Contains(v, "-next") {
		t.Errorf("back again: exit code %d: %s%s\n%s", r.code, r.out, r.errs, v)
	}
	u.unharmedButReader()
	u.leave()
}

// unharmedButReader is unharmed where the attach with stdin_once has ended by the client's end, which ends the reader.
func (u *upgrade) unharmedButReader() {
	u.t.Helper()
	eventually(u.t, 10*time.Second, "the reader has ended with its only input", func() error {
		if s := u.inspect("inspect", u.reads); s.text("exitCode") != "3" || s.text("state") != "CONTAINER_EXITED" {
			return fmt.Errorf("state %s, exit code %s", s.text("state"), s.text("exitCode"))
		}
		return nil
	})
	u.reads = u.counts
	u.unharmed()
}

// TestRestartByAProgramThatIsOfNoUse: whatever is wrong with the new program, the node goes on with the old one, and the
// error says what it was.
func TestRestartByAProgramThatIsOfNoUse(t *testing.T) {
	u := newUpgrade(t)
	whole, err := os.ReadFile(filepath.Join(nextDir, "coracle"))
	if err != nil {
		t.Fatal(err)
	}
	bad := u.mkdir("work", "bad")
	files := map[string][]byte{"cut": whole[:len(whole)/2], "empty": nil, "noise": []byte("\x7fELF and no more")}
	keeper := ctr.NewClient(filepath.Join(u.runtimeDir(), "keeper.sock"))
	version := u.runtimeVersion()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(bad, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
		err := keeper.RestartDaemon(context.Background(), filepath.Join(bad, name))
		if err == nil || !strings.Contains(err.Error(), "nothing was changed") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := keeper.ReplaceKeeper(context.Background(), filepath.Join(bad, name)); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
			t.Errorf("%s as a keeper: %v", name, err)
		}
	}
	// It runs, and is no daemon: the old one is started again from the file that ran.
	old := u.daemon()
	err = keeper.RestartDaemon(context.Background(), "/bin/true")
	if err == nil || !strings.Contains(err.Error(), "/bin/true") || !strings.Contains(err.Error(), "runs again") {
		t.Errorf("/bin/true: %v", err)
	}
	if now := u.daemon(); now == old {
		t.Errorf("the daemon is still process %d", old)
	}
	r := u.restart(filepath.Join(nextDir, "alien"), "--keeper")
	if r.code == 0 || !strings.Contains(r.errs, "the state is of version") || !strings.Contains(r.errs, "nothing was changed") {
		t.Errorf("a keeper that does not know the state: exit code %d: %s%s", r.code, r.out, r.errs)
	}
	if now := u.runtimeVersion(); now != version {
		t.Errorf("the version is %s, was %s", now, version)
	}
	u.letEnd()
	u.unharmed()
	u.leave()
	down := newHome(t)
	if r := down.command(nil, filepath.Join(nextDir, "coracle"), "restart"); r.code == 0 || !strings.Contains(r.errs, "is not up") {
		t.Errorf("restart of a node that is not up: exit code %d: %s%s", r.code, r.out, r.errs)
	}
}

// TestRestartKeeper swaps the keeper, several times, and the daemon in between. Execs go on; attachments are told, and
// the container's input stays open.
func TestRestartKeeper(t *testing.T) {
	u := newUpgrade(t)
	shell := u.streams("exec", "-i", u.counts, "sh", "-c", "while read x; do echo you said $x; done; exit 5")
	shell.says("one", "you said one")
	attached := u.streams("attach", "-i", u.reads)
	attached.says("two", "heard two")
	ended := time.AfterFunc(20*time.Millisecond, u.letEnd)
	for i, dir := range []string{nextDir, binDir, nextDir} {
		r := u.restart(dir, "--keeper")
		if r.code != 0 || !strings.Contains(r.out, "in place of") || strings.Contains(strings.Fields(r.out)[1], "-next") != (dir == nextDir) {
			t.Fatalf("coracle restart --keeper: exit code %d: %s%s", r.code, r.out, r.errs)
		}
		t.Log(strings.TrimSpace(r.out))
		shell.says(strconv.Itoa(i), "you said "+strconv.Itoa(i))
		if i == 0 {
			attached.ends("attach again")
			// Another daemon, which the keeper of now starts, and the next one takes over.
			if r := u.restart(nextDir); r.code != 0 {
				t.Fatalf("coracle restart: exit code %d: %s%s", r.code, r.out, r.errs)
			}
			shell.ends("the daemon is shutting down")
			shell = u.streams("exec", "-i", u.counts, "sh", "-c", "while read x; do echo you said $x; done; exit 5")
		}
	}
	if ended.Stop() {
		u.letEnd()
	}
	_ = shell.in.Close()
	shell.ends("exit code 5")
	again := u.streams("attach", "-i", u.reads)
	again.says("three", "heard three")
	u.unharmed()
	_ = again.in.Close()
	_ = again.cmd.Wait()
	u.unharmedButReader()

	// The daemon is watched as before.
	old := u.daemon()
	signal(t, old, syscall.SIGKILL)
	eventually(t, 10*time.Second, "a daemon answers again", func() error {
		if r := u.try("version"); r.code != 0 || u.daemon() == old {
			return fmt.Errorf("exit code %d: %s", r.code, r.errs)
		}
		return nil
	})
	u.leave()
}
