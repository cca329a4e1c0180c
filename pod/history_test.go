package pod

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/wire"
)

// loseRuntimeDir is what the machine's boot leaves of the runtime directory, and of the node.
func (h *harness) loseRuntimeDir(pods ...string) {
	h.t.Helper()
	h.keeper.reboot()
	for _, id := range pods {
		if err := unmountPodDir(h.store.podDir(id)); err != nil {
			h.t.Fatal(err)
		}
	}
	for _, dir := range []string{h.cgroups.root, filepath.Join(h.cfg.RuntimeDir, "pods"), filepath.Join(h.cfg.RuntimeDir, "containers")} {
		if err := os.RemoveAll(dir); err != nil {
			h.t.Fatal(err)
		}
	}
}

// TestHistoryOutlivesTheRuntimeDirectory: what the CRI has told of an end, and of a start, is known after the machine's
// boot, and goes with the container.
func TestHistoryOutlivesTheRuntimeDirectory(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	done, runs := h.launchIn(pod, "done", "exit 4"), h.launchIn(pod, "runs", "sleep 1000")
	was := h.exited(done)
	started := h.status(runs).StartedAt
	h.restart(func() { h.loseRuntimeDir(pod) })
	if st := h.status(done); st.State != was.State || st.ExitCode != 4 || st.Reason != "Error" || st.StartedAt != was.StartedAt || st.FinishedAt != was.FinishedAt {
		t.Errorf("done: %v, was %v", st, was)
	}
	if st := h.status(runs); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.Reason != "ContainerStatusUnknown" ||
		st.Message != "the node that it ran on ended" || st.ExitCode != 137 || st.StartedAt != started {
		t.Errorf("runs: %v, started at %d", st, started)
	}
	for _, id := range []string{done, runs} {
		if _, err := os.Stat(h.store.history.path(id)); err != nil {
			t.Error(err)
		}
		if _, err := h.RemoveContainer(h.ctx(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Error(err)
		}
	}
	if left, _ := filepath.Glob(h.store.history.path("*")); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// TestSaveHistoryTakesWhatTheDaemonMissed: the keeper had recorded an end, and both died.
func TestSaveHistoryTakesWhatTheDaemonMissed(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	missed, known := h.launchIn(pod, "missed", "sleep 1000"), h.launchIn(pod, "known", "exit 4")
	h.exited(known)
	h.restart(func() {
		dir := filepath.Join(h.cfg.RuntimeDir, wire.RecordDir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		at := time.Now()
		for id, state := range map[string]ctr.State{
			missed: {CreatedAt: at, StartedAt: at, FinishedAt: at, ExitCode: 9},
			known:  {CreatedAt: at, StartedAt: at, FinishedAt: at, ExitCode: 5}, // the first that was told counts
			pod:    {CreatedAt: at, StartedAt: at},
		} {
			state.ID = id
			if err := saveJSON(filepath.Join(dir, id+wire.RecordSuffix), wire.Record{Version: wire.RecordVersion, State: state}); err != nil {
				t.Fatal(err)
			}
		}
		for name, text := range map[string]string{"torn.json": "{", "x.json.tmp": "", "other.json": `{"version":1,"state":{"id":"x"}}`} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := SaveHistory(h.cfg.RuntimeDir, h.cfg.DataDir, slog.Default()); err != nil {
			t.Fatal(err)
		}
		h.loseRuntimeDir(pod)
	})
	for id, code := range map[string]int32{missed: 9, known: 4} {
		if st := h.status(id); st.ExitCode != code || st.Reason != "Error" {
			t.Errorf("%s: %v", id, st)
		}
	}
}

// TestSaveHistorySetsTornHistoryAside: an end is taken from the keeper's record whatever is in the place of the history,
// which is there for people to look at.
func TestSaveHistorySetsTornHistoryAside(t *testing.T) {
	for name, damage := range damages() {
		if name == "unreadable" {
			continue // not to the uid 0 that the daemon is
		}
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			pod := h.run(h.podConfig("p"))
			id := h.launchIn(pod, "c", "sleep 1000")
			path := h.store.history.path(id)
			var log bytes.Buffer
			h.restart(func() {
				dir := filepath.Join(h.cfg.RuntimeDir, wire.RecordDir)
				at := time.Now()
				state := ctr.State{ID: id, CreatedAt: at, StartedAt: at, FinishedAt: at, ExitCode: 9}
				if err := errors.Join(damage(path), os.MkdirAll(dir, 0o700),
					saveJSON(filepath.Join(dir, id+wire.RecordSuffix), wire.Record{Version: wire.RecordVersion, State: state})); err != nil {
					t.Fatal(err)
				}
				_, err := os.Lstat(path)
				damaged := err == nil
				if err := SaveHistory(h.cfg.RuntimeDir, h.cfg.DataDir, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
					t.Fatal(err)
				}
				if told := strings.Contains(log.String(), path+".unreadable"); told != damaged {
					t.Errorf("the log tells of a file set aside: %v\n%s", told, &log)
				}
				h.loseRuntimeDir(pod)
			})
			if st := h.status(id); st.ExitCode != 9 || st.Reason != "Error" {
				t.Errorf("%v", st)
			}
			if err := os.RemoveAll(path + ".unreadable"); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHalfWrittenHistoryIsSwept when a daemon starts after one that died in writing it.
func TestHalfWrittenHistoryIsSwept(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "exit 4")
	h.exited(id)
	half := []string{h.store.history.path(id) + tempSuffix, h.store.history.path("gone") + tempSuffix}
	h.restart(func() {
		for _, path := range half {
			if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, path := range half {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	if st := h.status(id); st.ExitCode != 4 {
		t.Errorf("%v", st)
	}
}

// TestHistoryIsOnStableStorageWhenTheDaemonHasEnded: nothing waits for the second that does not come.
func TestHistoryIsOnStableStorageWhenTheDaemonHasEnded(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "exit 4")
	h.exited(id)
	h.restart(func() {
		if left := h.store.history.dirty; len(left) > 0 {
			t.Errorf("not synced: %v", left)
		}
	})
	if st := h.status(id); st.ExitCode != 4 {
		t.Errorf("%v", st)
	}
}

// TestHistoryOfADaemonThatDiedIsSyncedByTheNext: whether it was on stable storage nobody knows.
func TestHistoryOfADaemonThatDiedIsSyncedByTheNext(t *testing.T) {
	dir := t.TempDir()
	if err := newHistory(dir, slog.New(slog.DiscardHandler)).write("c", containerStatus{StartedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	next := newHistory(dir, slog.New(slog.DiscardHandler))
	if err := next.sweepHalf(); err != nil {
		t.Fatal(err)
	}
	if _, ok := next.dirty["c"]; !ok || len(next.woken) != 1 {
		t.Errorf("to be synced: %v; woken %d times", next.dirty, len(next.woken))
	}
	if err := next.flush(); err != nil || len(next.dirty) > 0 {
		t.Errorf("%v, left: %v", err, next.dirty)
	}
}

// TestWhatCannotBeSyncedStaysDirty, for the next try.
func TestWhatCannotBeSyncedStaysDirty(t *testing.T) {
	h := newHistory(t.TempDir(), slog.New(slog.DiscardHandler))
	if err := h.write("c", containerStatus{StartedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	// A file that cannot be opened: a symbolic link to itself.
	if err := errors.Join(os.Remove(h.path("c")), os.Symlink("c.json", h.path("c"))); err != nil {
		t.Fatal(err)
	}
	if err := h.close(); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("synced: %v", err)
	}
	if err := os.Remove(h.path("c")); err != nil {
		t.Fatal(err)
	}
	if err := h.close(); err != nil || len(h.dirty) > 0 {
		t.Errorf("after the next try %v is left: %v", h.dirty, err)
	}
}

// TestLostStatusIsFoundAgain: whatever becomes of statuses while there is no daemon, pods and containers that live are
// known by what the kernel and the keeper have of them.
func TestLostStatusIsFoundAgain(t *testing.T) {
	for name, damage := range damages() {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			config := h.podConfig("p")
			config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
			pod := h.run(config)
			runs, done := h.launchIn(pod, "runs", "sleep 1000"), h.launchIn(pod, "done", "exit 4")
			h.exited(done)
			before, cgroup := h.status(runs), h.podOf(pod).status.snapshot().Cgroup
			h.restart(func() {
				for _, path := range []string{statusPath(h.store.podDir(pod)), statusPath(h.store.containerDir(runs)), statusPath(h.store.containerDir(done)),
					h.store.history.path(runs), h.store.history.path(done)} {
					if err := damage(path); err != nil {
						t.Fatal(err)
					}
				}
			})
			if st := h.sandbox(pod); st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
				t.Errorf("pod: %v", st)
			}
			if st := h.podOf(pod).status.snapshot(); st.Cgroup != cgroup || st.PausePid == 0 {
				t.Errorf("pod: %+v; its cgroup was %s", st, cgroup)
			}
			if st := h.status(runs); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || st.StartedAt != before.StartedAt {
				t.Errorf("runs: %v, was %v", st, before)
			}
			if st := h.status(done); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 4 {
				t.Errorf("done: %v", st)
			}
			h.stop(runs, 0)
		})
	}
}

func (h *harness) podOf(id string) *pod {
	h.t.Helper()
	_, p := h.index.observed(id)
	if p == nil {
		h.t.Fatalf("no pod %s", id)
	}
	return p
}

// TestDamagedSpecIsSetAsideAndNothingLeaks: a pod, or a container, of which nobody knows any more what it is, is ended and
// everything of it is given back; the others go on.
func TestDamagedSpecIsSetAsideAndNothingLeaks(t *testing.T) {
	for name, damage := range damages() {
		if name == "unreadable" {
			continue // not to the uid 0 that the daemon is
		}
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			good, bad := h.run(h.podConfig("good")), h.run(h.podConfig("bad"))
			h.launchIn(bad, "goes", "sleep 1000")
			stays, lost := h.launchIn(good, "stays", "sleep 1000"), h.launchIn(good, "lost", "sleep 1000")
			cgroup := h.podOf(bad).status.snapshot().Cgroup
			h.restart(func() {
				for _, path := range []string{h.store.podSpecPath(bad), h.store.containerSpecPath(lost)} {
					if err := damage(path); err != nil {
						t.Fatal(err)
					}
				}
			})
			if n := len(h.listPods(nil)); n != 1 || h.sandbox(good).State != runtimeapi.PodSandboxState_SANDBOX_READY {
				t.Errorf("%d pods, %v", n, h.sandbox(good))
			}
			states, err := h.keeper.List(h.ctx())
			if err != nil || len(states) != 1 || states[0].ID != stays {
				t.Errorf("the keeper has %v, %v", states, err)
			}
			if len(h.network.attached) != 1 || len(h.images.mounted) != 1 || slices.Contains(h.cgroups.pods(), cgroup) {
				t.Errorf("left: %v %v %v", h.network.attached, h.images.mounted, h.cgroups.pods())
			}
			for _, path := range []string{h.store.podSpecPath(bad), h.store.containerSpecPath(lost)} {
				if _, err := os.Lstat(path); err == nil {
					t.Errorf("%s is still there", path)
				}
				if err := os.RemoveAll(path + ".unreadable"); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
