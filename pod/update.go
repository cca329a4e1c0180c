package pod

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// resourcesConfig is stored by protojson, like the configurations in store.go.
type resourcesConfig struct {
	*runtimeapi.LinuxContainerResources
}

func (c resourcesConfig) MarshalJSON() ([]byte, error) {
	return protojson.Marshal(c.LinuxContainerResources)
}

func (c *resourcesConfig) UnmarshalJSON(raw []byte) error {
	c.LinuxContainerResources = &runtimeapi.LinuxContainerResources{}
	return decoder.Unmarshal(raw, c.LinuxContainerResources)
}

// resourceUpdate takes the place of what the spec of a container says of its resources.
type resourceUpdate struct {
	Asked       resourcesConfig       `json:"asked"` // all that was asked for, from the creation on
	Linux       *specs.LinuxResources `json:"linux,omitempty"`
	OOMScoreAdj *int                  `json:"oomScoreAdj,omitempty"`
	NotApplied  []string              `json:"notApplied,omitempty"` // in place of the spec's
}

// askedResources is what was asked for so far.
func (c *container) askedResources() *runtimeapi.LinuxContainerResources {
	if u := c.status.snapshot().Update; u != nil {
		return u.Asked.LinuxContainerResources
	}
	return c.spec.Config.GetLinux().GetResources()
}

// oci is the spec with the resources of the last update.
func (c *container) oci() *specs.Spec {
	u := c.status.snapshot().Update
	if u == nil || c.spec.OCI == nil || c.spec.OCI.Linux == nil || c.spec.OCI.Process == nil {
		return c.spec.OCI
	}
	spec, linux, process := *c.spec.OCI, *c.spec.OCI.Linux, *c.spec.OCI.Process
	linux.Resources, process.OOMScoreAdj = u.Linux, u.OOMScoreAdj
	spec.Linux, spec.Process = &linux, &process
	return &spec
}

// notApplied lists what was asked for and is not in force, as sentences.
func (c *container) notApplied() []string {
	if u := c.status.snapshot().Update; u != nil {
		return u.NotApplied
	}
	return c.spec.NotApplied
}

// updateContainer puts other limits on a container: "updates ContainerConfig of the container synchronously. If runtime
// fails to transactionally update the requested resources, an error is returned." One that was not started yet
// starts with them.
func (s *Service) updateContainer(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) error {
	if req.GetLinux() == nil {
		return invalid("update container %s: the request names no resources of Linux", req.GetContainerId())
	}
	return s.onContainer(ctx, "update", req.GetContainerId(), func(c *container) error {
		return s.updateContainerLocked(ctx, c, req.GetLinux())
	})
}

// onContainer does one operation on a container, which no other operation on its pod overlaps.
func (s *Service) onContainer(ctx context.Context, verb, id string, do func(*container) error) error {
	c, err := s.index.container(id)
	if err != nil {
		return err
	}
	p, err := s.index.pod(c.spec.PodID)
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	if err := do(c); err != nil {
		return fmt.Errorf("%s container %s: %w", verb, c.spec.ID, err)
	}
	return nil
}

func (s *Service) updateContainerLocked(ctx context.Context, c *container, wanted *runtimeapi.LinuxContainerResources) error {
	state := c.status.snapshot().state()
	if state == runtimeapi.ContainerState_CONTAINER_EXITED {
		return wrongState("it has exited: there is nothing to limit")
	}
	if oci := c.oci(); oci == nil || oci.Linux == nil || oci.Process == nil {
		return wrongState("its record holds no runtime specification: it can only be removed")
	}
	next, err := s.resolveUpdate(c, wanted)
	if err != nil {
		return err
	}
	// The keeper finishes what it has begun: what is in force and what is on record must not part when a caller hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateTimeout)
	defer cancel()
	running := state == runtimeapi.ContainerState_CONTAINER_RUNNING
	if running && next.Linux != nil {
		if err := s.deps.Containers.Update(ctx, c.spec.ID, next.Linux); err != nil {
			return err
		}
	}
	err = c.status.transition(func(st *containerStatus) { st.Update = next })
	if before := c.oci().Linux.Resources; err != nil && running && before != nil {
		// What is on disk is in force: the old limits come back.
		s.log("take back resources", c.spec.ID, s.deps.Containers.Update(ctx, c.spec.ID, before))
	}
	return err
}

// updateTimeout is longer than the keeper may need, which bounds a runtime program's time.
const updateTimeout = 2 * time.Minute

// resolveUpdate finds what is to be in force.
func (s *Service) resolveUpdate(c *container, wanted *runtimeapi.LinuxContainerResources) (*resourceUpdate, error) {
	asked := merged(c.askedResources(), wanted)
	limits, score, notes, err := s.limits(c, asked)
	if err != nil {
		return nil, err
	}
	_, _, old, err := s.limits(c, c.askedResources())
	if err != nil {
		return nil, err
	}
	others := slices.DeleteFunc(slices.Clone(c.notApplied()), func(n string) bool { return slices.Contains(old, n) || strings.HasPrefix(n, scoreStays) })
	next := &resourceUpdate{Asked: resourcesConfig{asked}, Linux: limits, OOMScoreAdj: score, NotApplied: append(others, notes...)}
	if now := c.oci().Process.OOMScoreAdj; c.status.snapshot().running() && value(score) != value(now) {
		// The kernel keeps it per process; those that run, and may have set their own, are left alone.
		next.OOMScoreAdj = now
		next.NotApplied = append(next.NotApplied, fmt.Sprintf(scoreStays+"%d: it counts from the start of a container", value(now)))
	}
	return next, nil
}

const scoreStays = "oom_score_adj stays "

// limits are what r comes to on this node, and sentences on what of it is not applied.
func (s *Service) limits(c *container, r *runtimeapi.LinuxContainerResources) (*specs.LinuxResources, *int, []string, error) {
	if r == nil {
		return nil, nil, nil, nil
	}
	limits, notes, err := ctr.BuildResources(r, s.cfg.Host, c.cgroup() != "")
	if err != nil {
		return nil, nil, nil, err
	}
	score, note, err := ctr.OOMScoreAdj(r, s.cfg.Host)
	if note != "" {
		notes = append(notes, note)
	}
	return limits, score, notes, err
}

// merged puts what is specified over what was: a zero is "not specified" (CRI).
func merged(before, wanted *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if before != nil {
		out = proto.CloneOf(before)
	}
	if len(wanted.GetHugepageLimits()) > 0 {
		out.HugepageLimits = nil // the list is one value
	}
	proto.Merge(out, wanted)
	return out
}

// updatePod records what a pod is to have in all. "This method is called after the Kubelet reconfigures the pod-level
// cgroups": the limits are the kubelet's affair, and it sends sums that leave out containers without a limit, so that
// nobody may enforce them. The weight is in force on the pod's cgroup.
func (s *Service) updatePod(ctx context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) error {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	if err := requireReady(p, "update resources of"); err != nil {
		return err
	}
	if err := s.setPodResources(p, req.GetOverhead(), req.GetResources()); err != nil {
		return fmt.Errorf("update pod %s: %w", p.spec.ID, err)
	}
	return nil
}

// podResources is what a pod is to have in all, as the last RPC said it.
type podResources struct {
	Overhead  resourcesConfig `json:"overhead"`
	Resources resourcesConfig `json:"resources"`
}

// resources are the pod's own and the overhead.
func (p *pod) resources() (overhead, resources *runtimeapi.LinuxContainerResources) {
	if r := p.status.snapshot().Resources; r != nil {
		return r.Overhead.LinuxContainerResources, r.Resources.LinuxContainerResources
	}
	return p.spec.Config.GetLinux().GetOverhead(), p.spec.Config.GetLinux().GetResources()
}

func (s *Service) setPodResources(p *pod, overhead, resources *runtimeapi.LinuxContainerResources) error {
	oldOverhead, oldResources := p.resources()
	next := &podResources{resourcesConfig{merged(oldOverhead, overhead)}, resourcesConfig{merged(oldResources, resources)}}
	if err := s.weighPod(p, next.Overhead.LinuxContainerResources, next.Resources.LinuxContainerResources); err != nil {
		return err
	}
	err := p.status.transition(func(st *podStatus) { st.Resources = next })
	if err != nil {
		s.log("take back the weight of a pod", p.spec.ID, s.weighPod(p, oldOverhead, oldResources))
	}
	return err
}

// weighPod gives the pod's cgroup the weight of its shares, and checks the rest.
func (s *Service) weighPod(p *pod, overhead, resources *runtimeapi.LinuxContainerResources) error {
	cgroup := p.status.snapshot().Cgroup
	for _, r := range []*runtimeapi.LinuxContainerResources{overhead, resources} {
		if r == nil {
			continue
		}
		if err := ctr.CheckResources(r); err != nil {
			return err
		}
	}
	shares := overhead.GetCpuShares() + resources.GetCpuShares()
	if shares <= 0 || cgroup == "" {
		return nil
	}
	if err := s.deps.Cgroups.SetCPUShares(cgroup, uint64(shares)); err != nil {
		return fmt.Errorf("weigh pod cgroup: %w", err)
	}
	return nil
}
