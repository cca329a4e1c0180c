package ctr

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestGatherHost(t *testing.T) {
	h, err := GatherHost(HostOptions{CgroupUsable: true, Controllers: []string{"memory"}, Strict: true})
	if err != nil {
		t.Fatal(err)
	}
	if !h.Controllers["memory"] || h.Controllers["cpu"] || !h.CgroupUsable || !h.Strict {
		t.Errorf("what was told is lost: %+v", h)
	}
	if !h.IDs.HasUID(0) || !h.IDs.HasGID(0) || h.IDs.HasUID(-1) {
		t.Errorf("id map %+v", h.IDs)
	}
	if len(h.Rlimits) != 16 || h.Rlimits["RLIMIT_NOFILE"].Hard == 0 {
		t.Errorf("rlimits %v", h.Rlimits)
	}
	if !h.Seccomp {
		t.Error("no seccomp: every kernel that runs user namespaces for ordinary users has it")
	}
}

func TestIDMap(t *testing.T) {
	got, err := parseIDMap("         1     100000      65536\n         0       1000          1\n")
	if err != nil {
		t.Fatal(err)
	}
	m := IDMap{UIDs: got}
	for id, want := range map[int64]bool{0: true, 1: true, 65536: true, 65537: false, -1: false, 1 << 40: false} {
		if m.HasUID(id) != want {
			t.Errorf("id %d mapped: %v, want %v", id, !want, want)
		}
	}
	for _, c := range []struct {
		ranges []IDRange
		want   string
	}{
		{got, "0-65536"}, {[]IDRange{{0, 1}}, "0"}, {[]IDRange{{0, 1}, {5, 2}, {7, 1}}, "0, 5-7"}, {nil, ""},
	} {
		if s := rangesString(c.ranges); s != c.want {
			t.Errorf("%v: %q, want %q", c.ranges, s, c.want)
		}
	}
	if _, err := parseIDMap("0 x 1\n"); err == nil {
		t.Error("nonsense was parsed")
	}
}

func TestMountinfo(t *testing.T) {
	for _, c := range []struct {
		line string
		want Propagation
		ok   bool
	}{
		{"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:5 - ext3 /dev/root rw", Propagation{Shared: true, Slave: true}, true},
		{"36 35 98:0 /mnt1 /mnt2 rw shared:5 - ext3 master:1 rw", Propagation{Shared: true}, true},
		{"36 35 98:0 /mnt1 /mnt2 rw - ext3 shared:1 rw", Propagation{}, true},
		{"37 35 98:0 /mnt1 /mnt2 rw shared:5 - ext3 /dev/root rw", Propagation{}, false},
		{"", Propagation{}, false},
	} {
		if got, ok := parseMountinfo(c.line, "36"); got != c.want || ok != c.ok {
			t.Errorf("%q: %+v, %v; want %+v, %v", c.line, got, ok, c.want, c.ok)
		}
	}
}

func TestNodeFS(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	var node nodeFS
	src, err := node.Lookup(filepath.Join(dir, "link"))
	if err != nil || src.Path != file || src.Mode != 0o640 {
		t.Errorf("%+v, %v; want the file that the link names", src, err)
	}
	if _, err := node.Lookup(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing path: %v, want fs.ErrNotExist", err)
	}
	if _, err := node.ReadFile(dir); err == nil {
		t.Error("a directory was read")
	}
	if raw, err := node.ReadFile(file); err != nil || string(raw) != "x" {
		t.Errorf("read %q, %v", raw, err)
	}
	devices, err := node.Devices("/dev")
	if err != nil || !slices.Contains(devices, "/dev/null") || slices.Contains(devices, "/dev/tty") || slices.Contains(devices, "/dev/ptmx") {
		t.Errorf("devices %v, %v", devices, err)
	}
	if _, err := node.Devices(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("devices of a missing directory: %v", err)
	}
}
