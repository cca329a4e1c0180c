package pod

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// podSpec is what was asked for. It never changes.
type podSpec struct {
	ID        string    `json:"id"`
	CreatedAt time.Time `json:"createdAt"`
	Handler   string    `json:"handler,omitempty"`
	// Sandboxed: its pause process always runs, by the handler's runtime, and its containers live in that one's sandbox.
	Sandboxed bool      `json:"sandboxed,omitempty"`
	Hostname  string    `json:"hostname"`
	Config    podConfig `json:"config"`
}

// podStatus is what happened. Its stamps only ever go from zero to a time:
//
//	             ReadyAt            StoppedAt                 Released
//	(making) ─────────────► Ready ─────────────► NotReady ─────────────► NotReady, nothing held
//	    │                           stop, death of                           │
//	    │ undo                      pause or node                            │ remove
//	    ▼                                                                    ▼
//	   gone                                                                 gone
type podStatus struct {
	BootID    string    `json:"bootID"` // the node's life in which it was made
	ReadyAt   time.Time `json:"readyAt,omitzero"`
	StoppedAt time.Time `json:"stoppedAt,omitzero"`
	// Released: pause process, address, ports, namespaces and shm were given back.
	Released      bool     `json:"released,omitempty"`
	IP            string   `json:"ip,omitempty"`
	AdditionalIPs []string `json:"additionalIPs,omitempty"`
	Cgroup        string   `json:"cgroup,omitempty"` // relative to the mount; "" = none
	PausePid      int      `json:"pausePid,omitempty"`
	// Resources are those of the last update, nil before the first.
	Resources *podResources `json:"resources,omitempty"`
}

type pod struct {
	spec   podSpec
	op     opLock
	dir    string // in the runtime directory: namespaces, files, status
	status *record[podStatus]
	cpu    cpuMeter

	announced atomic.Bool // events have told of its creation
	stopTold  atomic.Bool // and of its end
}

func newPod(spec podSpec, dir string, status podStatus) *pod {
	return &pod{spec: spec, op: newOpLock(), dir: dir, status: newRecord(statusPath(dir), status)}
}

// visible: RunPodSandbox is over and succeeded.
func (p *pod) visible() bool { return !p.status.snapshot().ReadyAt.IsZero() }

func (st podStatus) ready() bool { return !st.ReadyAt.IsZero() && st.StoppedAt.IsZero() }

func (st podStatus) state() runtimeapi.PodSandboxState {
	if st.ready() {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

// stopped makes the pod NotReady, and tells it; that says nothing about what is still held.
func (s *Service) stopped(p *pod) {
	s.recorded(p.spec.ID, p.status.fact(func(st *podStatus) {
		if st.StoppedAt.IsZero() {
			st.StoppedAt = time.Now()
		}
	}))
	s.tellStop(p)
}

// announce tells of a pod that RunPodSandbox has made.
func (s *Service) announce(p *pod) {
	s.publish(runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, p, p.spec.ID)
	s.publish(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, p, p.spec.ID)
	p.announced.Store(true)
	s.tellStop(p) // its pause process may be dead already
}

// tellStop tells of the end of a pod once, and never before its creation.
func (s *Service) tellStop(p *pod) {
	if p.announced.Load() && !p.status.snapshot().StoppedAt.IsZero() && p.stopTold.CompareAndSwap(false, true) {
		s.publish(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, p, p.spec.ID)
	}
}

func (p *pod) namespaces() *runtimeapi.NamespaceOption {
	return p.spec.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

func (p *pod) hostNetwork() bool { return p.namespaces().GetNetwork() == runtimeapi.NamespaceMode_NODE }
func (p *pod) hostIPC() bool     { return p.namespaces().GetIpc() == runtimeapi.NamespaceMode_NODE }

// sharesPID: all containers see each other's processes, which needs a process that lives as long as the pod.
func (p *pod) sharesPID() bool { return p.namespaces().GetPid() == runtimeapi.NamespaceMode_POD }

// hasPause: the pod has a process of its own.
func (p *pod) hasPause() bool { return p.sharesPID() || p.spec.Sandboxed }

func (p *pod) nsPath(kind string) string { return filepath.Join(p.dir, "ns", kind) }

// netNS is the network namespace of the pod's processes. That of host-network pods is the node's, which the
// node's parent process keeps: the daemon itself lives in the host's.
func (s *Service) netNS(p *pod) string {
	if p.hostNetwork() {
		return filepath.Join(s.cfg.RuntimeDir, "rk", "netns")
	}
	return p.nsPath("net")
}

// files are the paths that containers find at /etc and /dev/shm.
func (p *pod) files() ctr.PodFiles {
	f := ctr.PodFiles{
		ResolvConf: filepath.Join(p.etcDir(), "resolv.conf"),
		Hosts:      filepath.Join(p.etcDir(), "hosts"),
		Hostname:   filepath.Join(p.etcDir(), "hostname"),
		Shm:        filepath.Join(p.dir, "shm"),
	}
	if p.hostIPC() {
		f.Shm = "/dev/shm"
	}
	return f
}

// opLock is a mutex that can be waited for with a context: an RPC that is given up must not queue for ever.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the operation before: %w", ctx.Err())
	}
}

func (l opLock) tryLock() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l opLock) unlock() { <-l }
