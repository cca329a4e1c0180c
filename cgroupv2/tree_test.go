package cgroupv2

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOpenWithoutCgroup2(t *testing.T) {
	for _, mount := range []string{t.TempDir(), filepath.Join(t.TempDir(), "missing")} {
		tree, err := Open(mount)
		if err != nil {
			t.Fatal(err)
		}
		if tree.Usable() || tree.Reason() == "" || len(tree.Controllers()) != 0 {
			t.Errorf("%s: usable %v, reason %q, controllers %v", mount, tree.Usable(), tree.Reason(), tree.Controllers())
		}
		if _, err := tree.MakePod("", "x"); !errors.Is(err, ErrNotUsable) {
			t.Errorf("make pod: %v, want ErrNotUsable", err)
		}
		if err := tree.Kill("/pods/podx"); !errors.Is(err, ErrNotUsable) {
			t.Errorf("kill: %v, want ErrNotUsable", err)
		}
		if err := tree.RemovePod("/pods/podx"); err != nil {
			t.Errorf("remove pod: %v, want none: no pod has a cgroup there", err)
		}
	}
}

func TestPathsThatLeadOut(t *testing.T) {
	tree := &Tree{mount: group(t.TempDir()), usable: true}
	if err := os.WriteFile(string(tree.mount.join("cgroup.procs")), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, parent := range []string{"/../x", "..", "/a/../../b", "/supervisor", "supervisor/x", "/a\nb", "/" + strings.Repeat("n", 256),
		strings.Repeat("/long", 1000), "/cgroup.procs", "/cgroup.procs/x"} {
		if path, err := tree.MakePod(parent, "x"); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("parent %q: %q, %v, want ErrInvalidPath", parent, path, err)
		}
	}
	for _, id := range []string{"", "..", "a/b"} {
		if path, err := tree.MakePod("", id); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("id %q: %q, %v, want ErrInvalidPath", id, path, err)
		}
	}
	for _, pod := range []string{"", "/", "/pods", "/supervisor", "/kubepods/burstable", "/pods/podx/../../supervisor", "/podx"} {
		if err := tree.RemovePod(pod); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("remove %q: %v, want ErrInvalidPath", pod, err)
		}
	}
	for _, path := range []string{"", "/", "/supervisor", "/../x"} {
		if err := tree.Kill(path); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("kill %q: %v, want ErrInvalidPath", path, err)
		}
		if _, err := tree.Stats(path); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("stats %q: %v, want ErrInvalidPath", path, err)
		}
	}
}

func TestUndoRunsLastInFirstOut(t *testing.T) {
	var order string
	var back undo
	for _, step := range []string{"a", "b", "c"} {
		back.push(func() error { order += step; return nil })
	}
	cause := errors.New("cause")
	if err := back.run(cause); !errors.Is(err, cause) || order != "cba" {
		t.Errorf("order %q, error %v", order, err)
	}
}
