package rootless

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
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

func TestUnshareServesOneFormOnly(t *testing.T) {
	for _, args := range [][]string{nil, {"-n"}, {"-n", "sh", "-c", "true", "x"}, {"-m", "mount", "--bind", "/proc/self/ns/net", "/tmp/x"}} {
		if err := Unshare(args); err == nil || !strings.Contains(err.Error(), "only") {
			t.Errorf("unshare %v: %v", args, err)
		}
	}
}
