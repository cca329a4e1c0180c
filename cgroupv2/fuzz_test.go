package cgroupv2

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a kubelet says of a pod's cgroup, as it comes. To run one: make fuzz RUN=FuzzMakePod.

// FuzzMakePod makes pods in a directory in the place of the mount: what is made is below it, or it is refused.
func FuzzMakePod(f *testing.F) {
	for _, parent := range []string{"", "/", "/kubepods/burstable", "kubepods.slice/", "//a/./b//", "/../x", "..", "/a/../../b", "/supervisor",
		"supervisor/x", "/./supervisor/x", "/supervisor2", "/a\nb", "...", strings.Repeat("long", 64)} {
		f.Add(parent, "0123456789abcdef")
	}
	f.Add("/pods", "..")
	f.Add("/pods", "a/b")
	f.Add("/pods", "")
	outer := f.TempDir()
	f.Fuzz(func(t *testing.T, parent, podID string) {
		mount := filepath.Join(outer, "mount")
		if err := os.Mkdir(mount, 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if names(t, outer) != "mount" {
				t.Errorf("parent %q, pod %q: beside the mount there is %s", parent, podID, names(t, outer))
			}
			if err := os.RemoveAll(mount); err != nil {
				t.Fatal(err)
			}
		}()
		tree := &Tree{mount: group(mount), usable: true}
		full, err := tree.MakePod(parent, podID)
		if err != nil {
			if left := names(t, mount); left != "" || !errors.Is(err, ErrInvalidPath) {
				t.Errorf("parent %q, pod %q: %v; left %s", parent, podID, err, left)
			}
			return
		}
		checkClean(t, full)
		if filepath.Base(full) != "pod"+podID || filepath.Dir(full) == "/" {
			t.Errorf("parent %q, pod %q: %q", parent, podID, full)
		}
		if st, err := os.Lstat(filepath.Join(mount, full)); err != nil || !st.IsDir() {
			t.Errorf("%q was not made: %v", full, err)
		}
		if again, err := tree.MakePod(parent, podID); err != nil || again != full {
			t.Errorf("%q, made again %q, %v", full, again, err)
		}
	})
}

// FuzzCleanPath is for the paths that come back: of a record, to be counted, killed and removed.
func FuzzCleanPath(f *testing.F) {
	for _, path := range []string{"/pods/podx", "pods//podx/", "", "/", "//", "/supervisor", "/supervisor/../pods/podx", "/a/../supervisor", "/..a", "a\x00b"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, given string) {
		full, err := cleanPath(given, given)
		if err != nil {
			if !errors.Is(err, ErrInvalidPath) || full != "" {
				t.Errorf("%q: %q, %v", given, full, err)
			}
			return
		}
		checkClean(t, full)
		if again, err := cleanPath(full, full); err != nil || again != full {
			t.Errorf("%q: %q, and of that %q, %v", given, full, again, err)
		}
	})
}

// checkClean wants a path below the mount, and not the node's own, by its parts and not by what cleanPath is made of.
func checkClean(t *testing.T, full string) {
	t.Helper()
	parts := strings.Split(full, "/")
	if len(parts) < 2 || parts[0] != "" || parts[1] == "supervisor" {
		t.Errorf("path %q", full)
	}
	for _, part := range parts[1:] {
		if part == "" || part == "." || part == ".." || strings.ContainsAny(part, "\n\x00") {
			t.Errorf("path %q has a part %q", full, part)
		}
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}
