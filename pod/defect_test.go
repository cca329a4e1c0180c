package pod

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// TestADefectInTheWatcherHidesNobody: a panic while an exit is taken in does not end the daemon. The list of what is tells
// it again, and the exits of others meanwhile.
func TestADefectInTheWatcherHidesNobody(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.create(pod, shell("cursed", "exit 4"))
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	var met atomic.Bool
	write := c.status.also
	c.status.also = func(st containerStatus) error {
		if !st.FinishedAt.IsZero() && !met.Swap(true) {
			panic("a test's")
		}
		return write(st)
	}
	h.start(id)
	other := h.launchIn(pod, "other", "exit 5")
	for id, code := range map[string]int32{id: 4, other: 5} {
		if st := h.exited(id); st.GetExitCode() != code || st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("%v", st)
		}
	}
	if !met.Load() {
		t.Error("there was no defect")
	}
	if st := h.exited(h.launchIn(pod, "later", "exit 6")); st.GetExitCode() != 6 {
		t.Errorf("%v", st)
	}
}

// TestADefectInOneContainerHidesNoOther: what the keeper's list tells of the others is taken in.
func TestADefectInOneContainerHidesNoOther(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	end := filepath.Join(t.TempDir(), "end")
	var cursed string
	var containers []*container
	for _, name := range []string{"a", "b", "c", "d"} {
		id := h.launchIn(pod, name, "while [ ! -e "+end+" ]; do sleep 0.02; done; exit 4")
		c, err := h.index.container(id)
		if err != nil {
			t.Fatal(err)
		}
		if name == "b" {
			cursed = id
		}
		containers = append(containers, c)
	}
	// While nobody watches: else the events would tell of them.
	h.restart(func() {
		if err := os.WriteFile(end, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool {
			states, err := h.keeper.List(h.ctx())
			return err == nil && !slices.ContainsFunc(states, func(s ctr.State) bool { return s.Running() && s.ID != pod })
		})
		for _, c := range containers {
			if c.spec.ID == cursed {
				c.status.also = func(containerStatus) error { panic("a test's") }
			}
		}
		if _, err := h.adopt(h.ctx()); err == nil || !strings.Contains(err.Error(), "has a defect") {
			t.Errorf("adopt: %v", err)
		}
		for _, c := range containers {
			if exited := c.status.snapshot().state() == runtimeapi.ContainerState_CONTAINER_EXITED; exited == (c.spec.ID == cursed) {
				t.Errorf("%s: exited: %v", c.spec.Config.GetMetadata().GetName(), exited)
			}
		}
	})
	if st := h.status(cursed); st.GetExitCode() != 4 {
		t.Errorf("for a daemon without the defect: %v", st)
	}
}
