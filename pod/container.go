package pod

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// containerSpec is what was asked for, resolved to what the keeper gets. It never changes.
type containerSpec struct {
	ID         string          `json:"id"`
	PodID      string          `json:"podID"`
	CreatedAt  time.Time       `json:"createdAt"`
	Config     containerConfig `json:"config"`
	ImageID    string          `json:"imageID"`
	ImageRef   string          `json:"imageRef"`
	OCI        *specs.Spec     `json:"oci"`
	LogPath    string          `json:"logPath,omitempty"`
	StopSignal syscall.Signal  `json:"stopSignal"`
	NotApplied []string        `json:"notApplied,omitempty"` // sentences: what was asked and is not in force
}

// imageVolumes returns the mounts that are images, by the id under which each is mounted.
func (spec *containerSpec) imageVolumes() map[string]*runtimeapi.Mount {
	volumes := map[string]*runtimeapi.Mount{}
	for i, m := range spec.Config.GetMounts() {
		if m.GetImage().GetImage() != "" {
			volumes[fmt.Sprintf("%s-%d", spec.ID, i)] = m
		}
	}
	return volumes
}

// containerStatus is what happened. Its stamps only ever go from zero to a time:
//
//	         StartedAt             FinishedAt
//	Created ───────────► Running ─────────────► Exited
//	   │                                          ▲
//	   └──────────────────────────────────────────┘
//	     start failed (StartError), or the node died (ContainerStatusUnknown)
type containerStatus struct {
	Pid        int       `json:"pid,omitempty"`
	PidStart   uint64    `json:"pidStart,omitempty"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	ExitCode   int       `json:"exitCode,omitempty"`
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	Failure    string    `json:"failure,omitempty"` // a CRI reason, where the exit code does not tell all
	Message    string    `json:"message,omitempty"`
	// StopSent: the stop signal has gone out.
	StopSent bool `json:"stopSent,omitempty"`
	// Update holds the resources of the last update, nil before the first.
	Update *resourceUpdate `json:"update,omitempty"`
}

// The reasons of ContainerStatus that the kubelet and people know from other runtimes.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "ContainerStatusUnknown"
)

const (
	startErrorCode = 128 // what containerd reports, and the kubelet's users look for
	// lostCode: a node's death is SIGKILL to all, and 137 is what the kubelet itself writes for such containers.
	lostCode = 128 + int(syscall.SIGKILL)
)

type container struct {
	spec   containerSpec
	dir    string // in the runtime directory
	status *record[containerStatus]
	tell   func(*container, runtimeapi.ContainerEventType) // of its transitions, after they are published

	exited     chan struct{} // closed when FinishedAt is published
	exitedOnce sync.Once
	// stopSent: the stop signal goes out once, since many programs take a second one as "now". The status remembers it for
	// the daemon after this one.
	stopSent atomic.Bool
	cpu      cpuMeter
	memory   memoryEstimate
}

func (s *Service) newContainer(spec containerSpec, status containerStatus) *container {
	dir := s.store.containerDir(spec.ID)
	c := newContainer(spec, dir, status, s.told)
	c.status.also = func(st containerStatus) error { return s.store.history.write(spec.ID, st) }
	return c
}

func newContainer(spec containerSpec, dir string, status containerStatus,
	tell func(*container, runtimeapi.ContainerEventType)) *container {
	c := &container{
		spec: spec, dir: dir, tell: tell, exited: make(chan struct{}),
		status: newRecord(statusPath(dir), status),
	}
	c.stopSent.Store(status.StopSent)
	if !status.FinishedAt.IsZero() {
		c.exitedOnce.Do(func() { close(c.exited) })
	}
	return c
}

func (st containerStatus) state() runtimeapi.ContainerState {
	switch {
	case !st.FinishedAt.IsZero():
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case !st.StartedAt.IsZero():
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	default:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	}
}

func (st containerStatus) running() bool {
	return st.state() == runtimeapi.ContainerState_CONTAINER_RUNNING
}

func (st containerStatus) reason() string {
	switch {
	case st.FinishedAt.IsZero():
		return ""
	case st.Failure != "":
		return st.Failure
	case st.OOMKilled && st.ExitCode != 0:
		return reasonOOMKilled
	case st.ExitCode == 0:
		return reasonCompleted
	default:
		return reasonError
	}
}

// change is the container's one transition.
func (c *container) change(change func(*containerStatus)) error {
	var before, after containerStatus
	err := c.status.fact(func(st *containerStatus) {
		before = *st
		change(st)
		after = *st
	})
	if !after.FinishedAt.IsZero() {
		c.exitedOnce.Do(func() { close(c.exited) })
	}
	// One fact may be both: a short program's exit can be the first that is heard of its start.
	if before.StartedAt.IsZero() && !after.StartedAt.IsZero() {
		c.tell(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	}
	if before.FinishedAt.IsZero() && !after.FinishedAt.IsZero() {
		c.tell(c, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	}
	return err
}

// observe takes in what the keeper says. Facts arrive by events and by answers, in any order, and stamps are
// never taken back: a late "running" does not wake the dead. A process that ended before it was let run is not the
// container's end: StartContainer, which made it, knows what becomes of that, and a daemon that comes back discards it.
func (c *container) observe(state ctr.State) error {
	if state.StartedAt.IsZero() && state.Error == "" {
		return nil
	}
	return c.change(func(st *containerStatus) { st.take(state) })
}

func (st *containerStatus) take(state ctr.State) {
	st.OOMKilled = st.OOMKilled || state.OOMKilled
	if st.StartedAt.IsZero() {
		st.Pid, st.PidStart, st.StartedAt = state.Pid, state.PidStart, state.StartedAt
	}
	if !st.FinishedAt.IsZero() || !state.Exited() {
		return
	}
	st.FinishedAt, st.ExitCode = state.FinishedAt, state.ExitCode
	if state.Error != "" {
		st.Failure, st.Message, st.ExitCode = reasonStartError, state.Error, startErrorCode
	}
}

// startFailed is the end of a container whose program never ran.
func (c *container) startFailed(cause error) error {
	return c.change(func(st *containerStatus) {
		if !st.FinishedAt.IsZero() {
			return // its init process ended before its program ran, and that was told
		}
		st.FinishedAt = time.Now()
		st.ExitCode, st.Failure, st.Message = startErrorCode, reasonStartError, cause.Error()
	})
}

// lost is the end of a container of which nobody saw the exit.
func (c *container) lost(why string) error {
	return c.change(func(st *containerStatus) {
		if !st.FinishedAt.IsZero() {
			return
		}
		st.FinishedAt = time.Now()
		st.ExitCode, st.Failure, st.Message = lostCode, reasonUnknown, why
	})
}

// requireRunning names the container and its state where it does not run.
func (c *container) requireRunning(verb string) error {
	if st := c.status.snapshot(); !st.running() {
		return wrongState("%s container %s: it is %s, not running", verb, c.spec.ID, stateName(st.state()))
	}
	return nil
}

func stateName(state runtimeapi.ContainerState) string {
	switch state {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		return "created"
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return "running"
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		return "exited"
	}
	return fmt.Sprintf("in state %d", state)
}
