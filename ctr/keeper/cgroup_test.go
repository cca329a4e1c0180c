package keeper_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr"
)

// delegated skips where these tests have not been started in a cgroup2 subtree of their user:
//
//	mkdir D && chown -R USER D && echo $$ > D/cgroup.procs, as root, before
func delegated(t *testing.T) {
	t.Helper()
	if err := prepareOnce(); err != nil {
		t.Fatal(err)
	}
	if !cgroups {
		t.Skip("no delegated cgroup2 subtree here; to run this test: scripts/as-user.sh make test-unit, as root")
	}
}

func inCgroup(s *specs.Spec, path string) *specs.Spec {
	s.Linux.CgroupsPath = path
	return s
}

func TestACgroupTellsTheProcessesOfAContainer(t *testing.T) {
	delegated(t)
	n := newNode(t)
	if err := os.Mkdir("/sys/fs/cgroup/pod", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove("/sys/fs/cgroup/pod") })
	// In the node's pid namespace, an orphan in a mount namespace of its own: only the cgroup finds it.
	n.create("c1", administrator(inCgroup(pidNamespace(sh("(setsid unshare -m sleep 1701 &); echo up; sleep 1702"), ""), "/pod/c1")))
	n.start("c1")
	eventually(t, "both run", func() bool { return running("sleep 170") == 2 })
	n.delete("c1")
	if running("sleep 170") > 0 {
		t.Errorf("left:\n%s", processes())
	}
	if exists("/sys/fs/cgroup/pod/c1") {
		t.Error("the cgroup is left")
	}
}

func TestAnExecHasACgroupOfItsOwn(t *testing.T) {
	delegated(t)
	n := newNode(t)
	n.create("c1", inCgroup(sh("sleep 1000"), "/c1"))
	n.start("c1")
	subs := func() []string {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/c1/exec-*")
		return dirs
	}
	ctx := context.Background()
	e, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: process("/bin/sh", "-c", "(setsid sleep 1801 &); sleep 1802")})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the exec runs", func() bool { return running("sleep 180") >= 2 })
	if len(subs()) != 1 {
		t.Errorf("cgroups %v", subs())
	}
	if err := e.Close(); err != nil { // ends the orphan of another session too
		t.Error(err)
	}
	eventually(t, "all are dead", func() bool { return running("sleep 180") == 0 })
	eventually(t, "the cgroup is gone", func() bool { return len(subs()) == 0 })
	if code := n.execCode("c1", "/bin/sh", "-c", "(setsid sleep 1803 &)"); code != 0 {
		t.Errorf("exit %d", code)
	}
	eventually(t, "the background process runs", func() bool { return running("sleep 1803") > 0 })
	time.Sleep(20 * time.Millisecond)
	if running("sleep 1803") == 0 {
		t.Error("the background process is gone")
	}
	n.delete("c1")
	if running("sleep 1803") > 0 || exists("/sys/fs/cgroup/c1") {
		t.Error("something is left")
	}
}

func TestUpdateSetsAllLimitsOrNone(t *testing.T) {
	delegated(t)
	n := newNode(t)
	ctx := context.Background()
	n.create("c1", inCgroup(sh("sleep 1000"), "/c1"))
	n.start("c1")
	limit := func(name string) string {
		raw, err := os.ReadFile("/sys/fs/cgroup/c1/cgroup.max." + name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(raw))
	}
	update := func(depth, descendants string) error {
		return n.Update(ctx, "c1", &specs.LinuxResources{Unified: map[string]string{"cgroup.max.depth": depth, "cgroup.max.descendants": descendants}})
	}
	refused := func(depth, descendants string) {
		before := [2]string{limit("depth"), limit("descendants")}
		// Which one is written first is left to chance.
		for range 5 {
			if err := update(depth, descendants); err == nil {
				t.Errorf("%s and %s were accepted", depth, descendants)
			}
			if now := [2]string{limit("depth"), limit("descendants")}; now != before {
				t.Fatalf("a refused update has left %v, before it %v", now, before)
			}
		}
	}
	refused("7", "junk") // nothing has been set before
	refused("junk", "7")
	if err := update("7", "8"); err != nil || limit("depth") != "7" || limit("descendants") != "8" {
		t.Errorf("update: %v, depth %s, descendants %s", err, limit("depth"), limit("descendants"))
	}
	refused("9", "junk")
	refused("junk", "9")
	if _, err := os.Stat("/sys/fs/cgroup/c1/memory.max"); err != nil {
		bytes := int64(64 << 20)
		if err := n.Update(ctx, "c1", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &bytes}}); err == nil {
			t.Error("a limit without its controller was accepted")
		}
	}
	if code := n.execCode("c1", "true"); code != 0 {
		t.Errorf("exec after an update: %d", code)
	}
	n.delete("c1")
	if err := n.Update(ctx, "c1", &specs.LinuxResources{}); !errors.Is(err, ctr.ErrNotFound) {
		t.Errorf("update of no container: %v", err)
	}
}
