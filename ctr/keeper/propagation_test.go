package keeper_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// TestMountsPropagateAsTheSpecSays: between the node and a container in the direction asked for, and nothing of
// a container's own mounts reaches the node.
func TestMountsPropagateAsTheSpecSays(t *testing.T) {
	n := newNode(t)
	volume := filepath.Join(n.dir, "volume")
	for _, dir := range []string{"host", "guest"} {
		if err := os.MkdirAll(filepath.Join(volume, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for mode, want := range map[string]struct{ inward, outward bool }{
		"rprivate": {false, false}, "rslave": {true, false}, "rshared": {true, true}} {
		before := mountCount(t)
		s := administrator(sh("while :; do sleep 0.05; done"))
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: volume, Options: []string{"rbind", mode}})
		if mode != "rprivate" { // that of the root must be no less, or it cuts the tie
			s.Linux.RootfsPropagation = mode
		}
		n.create(mode, s)
		n.start(mode)
		if mountCount(t) != before {
			t.Errorf("%s: the container's own mounts are the node's too", mode)
		}
		if err := unix.Mount("tmpfs", filepath.Join(volume, "host"), "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if inward := n.execAs(mode, s.Process, "grep", "-q", " /mnt/host ", "/proc/mounts") == 0; inward != want.inward {
			t.Errorf("%s: the node's mount reaches the container: %v", mode, inward)
		}
		if code := n.execAs(mode, s.Process, "mount", "-t", "tmpfs", "tmpfs", "/mnt/guest"); code != 0 {
			t.Fatalf("%s: mount in the container: %d", mode, code)
		}
		if outward := mountCount(t) == before+2; outward != want.outward {
			t.Errorf("%s: the container's mount reaches the node: %v", mode, outward)
		}
		n.delete(mode)
		if want.outward {
			if err := unix.Unmount(filepath.Join(volume, "guest"), 0); err != nil {
				t.Error(err)
			}
		}
		if err := unix.Unmount(filepath.Join(volume, "host"), 0); err != nil {
			t.Error(err)
		}
	}
}

func mountCount(t *testing.T) int {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(raw), "\n")
}

// execAs runs a program with the capabilities of p.
func (n *node) execAs(id string, p *specs.Process, args ...string) int {
	n.t.Helper()
	q := process(args...)
	q.Capabilities = p.Capabilities
	e, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: id, Process: q})
	if err != nil {
		n.t.Fatal(err)
	}
	defer e.Close()
	code, err := e.Wait(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	return code
}
