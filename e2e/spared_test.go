package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestTwoUpsOfOneRuntimeDirectory: of two that start at once with different data directories, which have no lock in common,
// one lives, and the end of the other takes nothing from it.
func TestTwoUpsOfOneRuntimeDirectory(t *testing.T) {
	h := newHome(t)
	homes := []string{h.mkdir("data-a"), h.mkdir("data-b")}
	for round := range 6 {
		var ups [2]result
		var wg sync.WaitGroup
		for i := range ups {
			wg.Go(func() {
				ups[i] = h.command([]string{"XDG_DATA_HOME=" + homes[i]}, filepath.Join(binDir, "coracle"), "up", "--detach")
			})
		}
		wg.Wait()
		lost := ups[0].errs + ups[1].errs
		if (ups[0].code == 0) == (ups[1].code == 0) || !strings.Contains(lost, "is up already") && !strings.Contains(lost, "has the runtime directory") {
			t.Errorf("round %d: %+v", round, ups)
		}
		for _, file := range []string{"node.json", "coracle.sock", "keeper.sock", "ports.sock", "rk/lock", "rk/api.sock"} {
			if _, err := os.Lstat(h.path("run", "coracle", file)); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if r := h.coracle("status"); r.code != 0 {
			t.Errorf("round %d: coracle status: %+v", round, r)
		}
		for _, data := range homes {
			if r := h.command([]string{"XDG_DATA_HOME=" + data}, filepath.Join(binDir, "coracle"), "down", "--grace", "0s"); r.code != 0 {
				t.Errorf("round %d: coracle down: %+v", round, r)
			}
		}
		if _, err := os.Lstat(h.path("run", "coracle")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("round %d: the runtime directory: %v", round, err)
		}
	}
}

// TestALiveNodeIsSpared: a node that lives is not swept by an up with another data directory, which has another lock,
// whatever became of the node's record; and down finds it from there too.
func TestALiveNodeIsSpared(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("spared", nil)
	id := n.start(pod, file, "spared", image, shell("exec sleep 1000"))
	daemon := n.daemon()
	record := filepath.Join(n.runtimeDir(), "node.json")
	whole, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := []string{"XDG_DATA_HOME=" + n.mkdir("other")}
	coracle := func(args ...string) result { return n.command(elsewhere, filepath.Join(binDir, "coracle"), args...) }
	try := func(name string, env []string, args ...string) {
		t.Helper()
		before := filesBelow(t, n.runtimeDir())
		r := n.command(env, filepath.Join(binDir, "coracle"), args...)
		if r.code == 0 || !strings.Contains(r.errs, "node default is up already") || !strings.Contains(r.errs, "coracle down") ||
			env != nil && !strings.Contains(r.errs, "another XDG_DATA_HOME") {
			t.Errorf("record %s, coracle %v: exit code %d\n%s%s", name, args, r.code, r.out, r.errs)
		}
		if after := filesBelow(t, n.runtimeDir()); !slices.Equal(before, after) {
			t.Errorf("record %s, coracle %v: the runtime directory had %q and has %q", name, args, before, after)
		}
		if out := n.exec(id, "echo", "here"); out != "here" || n.daemon() != daemon {
			t.Fatalf("record %s, coracle %v: %q", name, args, out)
		}
	}
	try("whole", elsewhere, "up", "--detach")
	for name, damage := range damages {
		if err := errors.Join(os.RemoveAll(record), damage(record, whole)); err != nil {
			t.Fatal(err)
		}
		try(name, elsewhere, "up", "--detach") // first: where it is not refused, it returns
		try(name, elsewhere, "up")
		try(name, nil, "up")
	}
	n.traces = n.trace()
	// The last damage is still there.
	if r := coracle("down", "--grace", "0s"); r.code != 0 || !strings.Contains(r.out, "node default is down") {
		t.Errorf("coracle down: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	<-n.ended
	n.hangUp()
	n.expectNothingLeft(2 * time.Second)
}

// TestANodeElsewhereIsTold: commands with another XDG_RUNTIME_DIR than the node's say so, and leave it and its containers alone.
func TestANodeElsewhereIsTold(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("elsewhere", nil)
	id := n.start(pod, file, "elsewhere", image, shell("exec sleep 1000"))
	other := []string{"XDG_RUNTIME_DIR=" + n.mkdir("other")}
	for _, args := range [][]string{{"status"}, {"restart"}, {"restart", "--keeper"}, {"enter", "--", "true"}, {"up"}, {"up", "--detach"}, {"down"}} {
		began := time.Now()
		r := n.command(other, filepath.Join(binDir, "coracle"), args...)
		if r.code == 0 || !strings.Contains(r.errs, "export XDG_RUNTIME_DIR="+n.path("run")+"\n") || time.Since(began) > 5*time.Second {
			t.Errorf("coracle %v: exit code %d after %s\n%s%s", args, r.code, time.Since(began), r.out, r.errs)
		}
		if out := n.exec(id, "echo", "here"); out != "here" {
			t.Fatalf("coracle %v: %q", args, out)
		}
	}
	if left := glob(t, n.dir, "other/*"); len(left) > 0 {
		t.Errorf("left in the other directory: %q", left)
	}
	n.down()
}

// filesBelow lists the names in a directory.
func filesBelow(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
