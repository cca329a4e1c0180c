package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

func TestDirectoriesOfANode(t *testing.T) {
	run, home := t.TempDir(), t.TempDir()
	vars := map[string]string{"XDG_RUNTIME_DIR": run, "HOME": home}
	for _, c := range []struct{ name, folder string }{{"default", "coracle"}, {"ci-1", "coracle-ci-1"}} {
		n, err := NewNode(c.name, env(vars))
		if err != nil {
			t.Fatal(err)
		}
		if n.RuntimeDir != filepath.Join(run, c.folder) || n.DataDir != filepath.Join(home, ".local/share", c.folder) {
			t.Errorf("node %s: %+v", c.name, n)
		}
	}
	vars["XDG_DATA_HOME"] = filepath.Join(home, "data")
	n, err := NewNode("default", env(vars))
	if err != nil || n.DataDir != filepath.Join(home, "data/coracle") {
		t.Errorf("with XDG_DATA_HOME: %+v, %v", n, err)
	}
}

func TestANodeIsKnownOnceItHasADirectory(t *testing.T) {
	n := Node{Name: "x", RuntimeDir: filepath.Join(t.TempDir(), "r"), DataDir: filepath.Join(t.TempDir(), "d")}
	if n.Known() {
		t.Error("known before it was up")
	}
	if err := n.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	if !n.Known() {
		t.Error("not known though it has directories")
	}
}

func TestANodeNameThatIsNoFileNameIsRefused(t *testing.T) {
	for _, name := range []string{"", "..", "a/b", "A", "-a", "a-", strings.Repeat("a", 33), "a b"} {
		if _, err := NewNode(name, env(nil)); err == nil || !strings.Contains(err.Error(), "node name") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// Each thing that a host may lack gets one sentence with the cause and a command.
func TestWhatTheHostLacksIsSaid(t *testing.T) {
	run, home := t.TempDir(), t.TempDir()
	file := filepath.Join(home, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(run, strings.Repeat("d", 90))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		vars map[string]string
		says string
	}{
		"no runtime directory":        {map[string]string{"HOME": home}, "XDG_RUNTIME_DIR is not set"},
		"a relative one":              {map[string]string{"HOME": home, "XDG_RUNTIME_DIR": "run"}, "not an absolute path"},
		"one that is absent":          {map[string]string{"HOME": home, "XDG_RUNTIME_DIR": run + "/none"}, "no such file"},
		"one that is a file":          {map[string]string{"HOME": home, "XDG_RUNTIME_DIR": file}, "not a directory"},
		"one too long for a socket":   {map[string]string{"HOME": home, "XDG_RUNTIME_DIR": long}, "too long"},
		"no home":                     {map[string]string{"XDG_RUNTIME_DIR": run}, "neither HOME nor XDG_DATA_HOME"},
		"a home that is not to write": {map[string]string{"XDG_RUNTIME_DIR": run, "HOME": "/proc"}, "cannot be written"},
	} {
		_, err := NewNode("default", env(c.vars))
		var p *Problem
		if !errors.As(err, &p) {
			t.Errorf("%s: %v is no Problem", name, err)
			continue
		}
		if !strings.Contains(p.Cause, c.says) || p.Fix == "" || strings.ContainsRune(p.Error(), '\n') {
			t.Errorf("%s: %q", name, p.Error())
		}
	}
}

func testNode(t *testing.T) Node {
	t.Helper()
	n := Node{Name: "t", RuntimeDir: t.TempDir(), DataDir: t.TempDir()}
	if err := n.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDirectoriesArePrivateToTheUser(t *testing.T) {
	n := testNode(t)
	if err := os.Chmod(n.RuntimeDir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := n.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(n.RuntimeDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("a directory that was open to all is left %v, %v", info.Mode(), err)
	}
	// Somebody else's, as found in a place that all may write; and a link of ours to it.
	var p *Problem
	n.RuntimeDir = "/usr"
	if os.Geteuid() == 0 {
		n.RuntimeDir = t.TempDir()
		if err := os.Chown(n.RuntimeDir, 1, 1); err != nil {
			t.Fatal(err)
		}
	}
	foreign := n.RuntimeDir
	if err := n.MakeDirs(); !errors.As(err, &p) {
		t.Errorf("another user's directory: %v", err)
	}
	n.RuntimeDir = filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(foreign, n.RuntimeDir); err != nil {
		t.Fatal(err)
	}
	if err := n.MakeDirs(); !errors.As(err, &p) {
		t.Errorf("a link to another user's directory: %v", err)
	}
}

// Blanks must come through a shell and through the clients, which take the endpoint for a URL.
func TestAnEndpointWithBlanksIsAURL(t *testing.T) {
	n := Node{Name: "default", RuntimeDir: "/run/my node"}
	if u, err := url.Parse(n.Endpoint()); err != nil || u.Scheme != "unix" || u.Host != "" || u.Path != n.Socket() || strings.Contains(n.Endpoint(), " ") {
		t.Errorf("%s: %+v, %v", n.Endpoint(), u, err)
	}
}

func TestNodesWithOtherDirectoriesHaveOtherCgroups(t *testing.T) {
	a, b := Node{Name: "ci", RuntimeDir: "/run/a"}, Node{Name: "ci", RuntimeDir: "/run/b"}
	if a.CgroupName() == b.CgroupName() || !strings.HasPrefix(a.CgroupName(), "ci-") {
		t.Errorf("%s, %s", a.CgroupName(), b.CgroupName())
	}
}

func TestARecordTellsWhetherItsProcessLives(t *testing.T) {
	n := testNode(t)
	if _, err := n.ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("record of a node that is not up: %v", err)
	}
	if err := n.WriteRecord(Record{Program: "1", Driver: "d"}); err != nil {
		t.Fatal(err)
	}
	r, err := n.ReadRecord()
	if err != nil || r.PID != os.Getpid() || r.Driver != "d" || !r.Alive() {
		t.Fatalf("%+v, %v, alive %v", r, err, r.Alive())
	}
	r.PIDStart++
	if r.Alive() {
		t.Error("a process of the same pid that started at another time is taken for the node's")
	}
}

func TestARecordOfANewerVersionIsRefused(t *testing.T) {
	n := testNode(t)
	if err := os.WriteFile(n.recordFile(), []byte(`{"version": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.ReadRecord(); err == nil || !strings.Contains(err.Error(), "version 99") {
		t.Fatalf("got %v", err)
	}
}

func TestOneNodeHasOneHolder(t *testing.T) {
	n := testNode(t)
	lock, err := n.TryLock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.TryLock(); !errors.Is(err, ErrUp) {
		t.Fatalf("a second holder: %v", err)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := n.TryLock()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Sweep(), again.Release()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(n.RuntimeDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the sweep: %v", err)
	}
}

// The starter of a detached node holds its lock until the node itself does, without a moment in which nobody has it.
func TestALockIsHandedOver(t *testing.T) {
	n := testNode(t)
	lock, err := n.TryLock()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	lock.HandOver(cmd)
	if err := errors.Join(cmd.Start(), lock.Release()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.TryLock(); !errors.Is(err, ErrUp) {
		t.Errorf("while the other process lives: %v", err)
	}
	if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	again, err := n.TryLock()
	if err != nil {
		t.Fatalf("after its end: %v", err)
	}
	// As that process takes it: by its descriptor, with no second open.
	data, derr := unix.Dup(int(again.data.Fd()))
	runtime, rerr := unix.Dup(int(again.runtime.Fd()))
	if err := errors.Join(derr, rerr); err != nil {
		t.Fatal(err)
	}
	t.Setenv(lockEnv, fmt.Sprintf("%d,%d", data, runtime))
	taken, err := n.TryLock()
	if err != nil || os.Getenv(lockEnv) != "" {
		t.Fatalf("taken over: %v; the variable is %q", err, os.Getenv(lockEnv))
	}
	if err := again.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.TryLock(); !errors.Is(err, ErrUp) {
		t.Errorf("beside the one that took it over: %v", err)
	}
	if err := taken.Release(); err != nil {
		t.Fatal(err)
	}
}

func TestUnshareServesOneFormOnly(t *testing.T) {
	for _, args := range [][]string{nil, {"-n"}, {"-n", "sh", "-c", "true", "x"}, {"-m", "mount", "--bind", "/proc/self/ns/net", "/tmp/x"}} {
		if err := Unshare(args); err == nil || !strings.Contains(err.Error(), "only") {
			t.Errorf("unshare %v: %v", args, err)
		}
	}
}
