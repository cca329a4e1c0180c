package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/wire"
)

func TestAContainerIsCreatedStartedEndedAndDeleted(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	created := n.create("c1", sh("echo out; echo err >&2; exit 7"))
	if created.Pid == 0 || created.PidStart == 0 || created.CreatedAt.IsZero() || created.Running() || created.Exited() {
		t.Fatalf("created: %+v", created)
	}
	if _, err := n.Create(ctx, ctr.CreateRequest{ID: "c1", Spec: sh("true")}); !errors.Is(err, ctr.ErrExists) {
		t.Fatalf("second create: %v", err)
	}
	started := n.start("c1")
	if started.StartedAt.IsZero() {
		t.Fatalf("started: %+v", started)
	}
	exited := n.exit("c1")
	if exited.ExitCode != 7 || !exited.Exited() || exited.Running() || exited.FinishedAt.Before(exited.StartedAt) {
		t.Fatalf("exited: %+v", exited)
	}
	lines := n.lines("c1")
	slices.Sort(lines)
	if want := []string{"stderr F err", "stdout F out"}; !slices.Equal(lines, want) {
		t.Fatalf("log %q, want %q", lines, want)
	}
	var record struct{ State ctr.State }
	raw, err := os.ReadFile(filepath.Join(n.dir, "keeper/c1.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &record); err != nil || record.State.ExitCode != 7 || !record.State.Exited() {
		t.Fatalf("record %s: %v", raw, err)
	}
	if _, err := n.Start(ctx, "c1"); !errors.Is(err, ctr.ErrNotRunning) {
		t.Fatalf("start of an exited container: %v", err)
	}
	n.delete("c1")
	n.delete("c1") // idempotent
	if states, err := n.List(ctx); err != nil || len(states) != 0 {
		t.Fatalf("list after delete: %v, %v", states, err)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "keeper/c1.json")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("record after delete: %v", err)
	}
	if err := n.Kill(ctx, "c1", syscall.SIGTERM, false); !errors.Is(err, ctr.ErrNotFound) {
		t.Fatalf("kill of an unknown container: %v", err)
	}
}

func TestSignalsReachTheContainer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	for id, tc := range map[string]struct {
		signal syscall.Signal
		all    bool
		code   int
	}{"term": {syscall.SIGTERM, false, 43}, "kill": {syscall.SIGKILL, false, 137}, "killall": {syscall.SIGKILL, true, 137},
		"termall": {syscall.SIGTERM, true, 43}} {
		n.create(id, sh(`trap 'exit 43' TERM; echo ready; while :; do sleep 0.01; done`))
		n.start(id)
		eventually(t, "the trap is set", func() bool { return len(n.lines(id)) == 1 })
		if err := n.Kill(ctx, id, tc.signal, tc.all); err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		if got := n.exit(id); got.ExitCode != tc.code {
			t.Errorf("%s: exit code %d, want %d", id, got.ExitCode, tc.code)
		}
		if err := n.Kill(ctx, id, tc.signal, tc.all); err != nil {
			t.Errorf("%s: kill of a dead container: %v", id, err)
		}
	}
	if err := n.Kill(ctx, "term", 99, false); !errors.Is(err, wire.ErrBadRequest) {
		t.Errorf("signal 99: %v", err)
	}
}

func TestACreatedContainerCanBeKilledAndDeleted(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.create("c1", sh("true"))
	if err := n.Kill(ctx, "c1", syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if s := n.exit("c1"); s.ExitCode != 137 || !s.StartedAt.IsZero() {
		t.Fatalf("killed before its start: %+v", s)
	}
	if _, err := n.Start(ctx, "c1"); !errors.Is(err, ctr.ErrNotRunning) {
		t.Fatalf("start: %v", err)
	}
	n.create("c2", sh("true"))
	n.delete("c2")
	n.create("c3", sh("sleep 1000"))
	n.start("c3")
	if _, err := n.Start(ctx, "c3"); err == nil {
		t.Fatal("a second start succeeded")
	}
	n.delete("c3")
	n.create("c4", sh("sleep 1000"))
	n.start("c4") // the end of the node kills it
}

func TestWhatCannotStartSaysWhyAndLeavesNothing(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	for name, tc := range map[string]struct {
		change func(*ctr.CreateRequest)
		want   string
	}{
		"no program":   {func(r *ctr.CreateRequest) { r.Spec.Process.Args = []string{"/bin/nope"} }, `/bin/nope`},
		"not in PATH":  {func(r *ctr.CreateRequest) { r.Spec.Process.Args = []string{"nope"} }, `not found in $PATH`},
		"no rootfs":    {func(r *ctr.CreateRequest) { r.Spec.Root.Path = "/nowhere" }, "/nowhere"},
		"bad mount":    {func(r *ctr.CreateRequest) { r.Spec.Mounts[0].Type = "nofs" }, "proc"},
		"no log dir":   {func(r *ctr.CreateRequest) { r.LogPath = "/nowhere/c.log" }, "/nowhere/c.log"},
		"relative log": {func(r *ctr.CreateRequest) { r.LogPath = "c.log" }, "absolute"},
		"bad id":       {func(r *ctr.CreateRequest) { r.ID = "../x" }, "id must be"},
		"no command":   {func(r *ctr.CreateRequest) { r.Spec.Process.Args = nil }, "no command"},
		"no spec":      {func(r *ctr.CreateRequest) { r.Spec = nil }, "spec needs"},
		"node's mounts": {func(r *ctr.CreateRequest) {
			r.Spec.Linux.Namespaces = r.Spec.Linux.Namespaces[1:]
		}, "mount namespace"},
	} {
		r := ctr.CreateRequest{ID: "c1", Spec: sh("true"), LogPath: n.logPath("c1")}
		tc.change(&r)
		_, err := n.Create(ctx, r)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
		if states, _ := n.List(ctx); len(states) != 0 {
			t.Errorf("%s: left %v", name, states)
		}
		if left, _ := filepath.Glob(n.dir + "/keeper/lc/*"); len(left) != 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	if s := n.run("c1", sh("exit 3")); s.ExitCode != 3 {
		t.Errorf("the id is not free again: %+v", s)
	}
}

func TestEventsAreReplayedInOrder(t *testing.T) {
	n := newNode(t)
	for i := range 3 {
		n.run(fmt.Sprintf("c%d", i), sh(fmt.Sprintf("exit %d", i)))
	}
	info, err := n.Info(context.Background())
	if err != nil || info.Seq != 3 || info.Version != "test" || info.Pid != os.Getpid() || len(info.BootID) != 32 {
		t.Fatalf("info %+v, %v", info, err)
	}
	// A daemon that saw the first event only comes back.
	ctx, cancel := context.WithCancel(context.Background())
	var got []string
	err = n.Events(ctx, 1, func(e ctr.Event) error {
		got = append(got, fmt.Sprintf("%d %s %s %d", e.Seq, e.Type, e.State.ID, e.State.ExitCode))
		if e.Seq == 3 {
			n.create("live", sh("exit 9"))
			n.start("live")
		}
		if e.Seq == 4 {
			cancel()
		}
		return nil
	})
	if want := []string{"2 exit c1 1", "3 exit c2 2", "4 exit live 9"}; !errors.Is(err, context.Canceled) || !slices.Equal(got, want) {
		t.Fatalf("%v, events %q, want %q", err, got, want)
	}
}

func TestProcessesOfASharedPidNamespaceEndWithTheirContainer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	// Orphans, daemons and children of the container in the node's own pid namespace.
	script := `(sleep 1111 &); setsid sleep 1112 & sleep 1113 & echo ready; `
	n.create("exits", pidNamespace(sh(script+"exit 5"), ""))
	n.start("exits")
	if s := n.exit("exits"); s.ExitCode != 5 {
		t.Errorf("exit %+v", s)
	}
	if running("sleep 111") > 0 {
		t.Errorf("left after the exit:\n%s", processes())
	}
	n.create("deleted", pidNamespace(sh(script+"sleep 1114"), ""))
	n.start("deleted")
	eventually(t, "it runs", func() bool { return running("sleep 1114") > 0 })
	n.delete("deleted")
	if running("sleep 111") > 0 {
		t.Errorf("left after the delete:\n%s", processes())
	}
	n.create("killed", pidNamespace(sh(script+"sleep 1114"), ""))
	n.start("killed")
	eventually(t, "it runs", func() bool { return running("sleep 1114") > 0 })
	if err := n.Kill(ctx, "killed", syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if s := n.exit("killed"); s.ExitCode != 137 || running("sleep 111") > 0 {
		t.Errorf("after kill all: %+v\n%s", s, processes())
	}
}

func TestAPodsPidNamespaceOutlivesOneContainer(t *testing.T) {
	n := newNode(t)
	pause := n.create("pause", sh("trap 'exit 0' TERM; while :; do sleep 0.05; done"))
	n.start("pause")
	join := fmt.Sprintf("/proc/%d/ns/pid", pause.Pid)
	n.create("a", pidNamespace(sh("sleep 1201 & (sleep 1202 &) ; sleep 1203"), join))
	n.start("a")
	n.create("b", pidNamespace(sh("sleep 1301 & sleep 1302"), join))
	n.start("b")
	eventually(t, "both run", func() bool { return running("sleep 120") == 3 && running("sleep 130") == 2 })
	n.delete("a")
	if running("sleep 120") != 0 || running("sleep 130") != 2 || !n.state("b").Running() {
		t.Errorf("after the delete of a:\n%s", processes())
	}
	n.delete("pause") // and its namespace with all
	if s := n.exit("b"); s.ExitCode != 137 {
		t.Errorf("b after the end of its pid namespace: %+v", s)
	}
}

func TestOrphansAreReapedAndNoStatusIsStolen(t *testing.T) {
	n := newNode(t)
	n.create("orphans", pidNamespace(sh(`echo ready; while :; do (true &); (sleep 0.01 &); done`), ""))
	n.start("orphans")
	eventually(t, "it runs", func() bool { return len(n.lines("orphans")) == 1 })
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for j := range 6 {
				id := fmt.Sprintf("c%d-%d", i, j)
				if s := n.run(id, sh(fmt.Sprintf("exit %d", 10+j))); s.ExitCode != 10+j {
					t.Errorf("%s: %+v", id, s)
				}
				if err := n.Delete(context.Background(), id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	n.delete("orphans")
	eventually(t, "no zombie is left", func() bool { return strings.Count(processes(), "\n") == 0 })
}

func TestAnExitIsToldThoughAnotherProcessHoldsThePipe(t *testing.T) {
	n := newNode(t)
	s := n.create("c1", sh("echo first; exit 4"))
	held, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", s.Pid), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	n.start("c1")
	exited := n.exit("c1")
	if told := time.Since(exited.FinishedAt); exited.ExitCode != 4 || told > 1500*time.Millisecond {
		t.Errorf("exit %+v told after %s", exited, told)
	}
	if _, err := held.WriteString("later\n"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the later line is logged", func() bool {
		return slices.Equal(n.lines("c1"), []string{"stdout F first", "stdout F later"})
	})
	n.delete("c1")
	if _, err := held.WriteString("too late\n"); !errors.Is(err, unix.EPIPE) {
		t.Errorf("write after the delete: %v", err)
	}
}
