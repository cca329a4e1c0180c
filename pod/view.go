package pod

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

func (s *Service) podStatus(req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.PodSandboxStatusResponse{
		Status: p.view(), ContainersStatuses: s.containerViews(p), Timestamp: time.Now().UnixNano(),
	}
	if req.GetVerbose() {
		st := p.status.snapshot()
		overhead, resources := p.resources()
		out.Info, err = info(map[string]any{
			"pid": st.PausePid, "networkNamespace": s.netNS(p), "cgroup": st.Cgroup, "bootID": st.BootID,
			"readyAt": st.ReadyAt, "stoppedAt": st.StoppedAt, "released": st.Released,
			"overhead": overhead, "resources": resources, "hostname": p.spec.Hostname, "config": p.spec.Config,
		})
	}
	return out, err
}

func (p *pod) view() *runtimeapi.PodSandboxStatus {
	st := p.status.snapshot()
	view := &runtimeapi.PodSandboxStatus{
		Id: p.spec.ID, Metadata: p.spec.Config.GetMetadata(), State: st.state(),
		CreatedAt: p.spec.CreatedAt.UnixNano(), Network: &runtimeapi.PodSandboxNetworkStatus{Ip: st.IP},
		Linux:  &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: p.namespaces()}},
		Labels: p.spec.Config.GetLabels(), Annotations: p.spec.Config.GetAnnotations(), RuntimeHandler: p.spec.Handler,
	}
	for _, ip := range st.AdditionalIPs {
		view.Network.AdditionalIps = append(view.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return view
}

// containerViews are the containers of a pod, oldest first.
func (s *Service) containerViews(p *pod) []*runtimeapi.ContainerStatus {
	var views []*runtimeapi.ContainerStatus
	for _, c := range s.sortedContainers(p.spec.ID) {
		views = append(views, c.view())
	}
	return views
}

func (s *Service) containerStatus(req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.ContainerStatusResponse{Status: c.view()}
	if req.GetVerbose() {
		out.Info, err = info(map[string]any{
			"pid": c.status.snapshot().Pid, "sandboxID": c.spec.PodID, "notApplied": c.notApplied(),
			"runtimeSpec": c.oci(), "config": c.spec.Config,
		})
	}
	return out, err
}

// info packs verbose information where crictl looks for it: one JSON object under the key "info".
func info(values map[string]any) (map[string]string, error) {
	raw, err := json.Marshal(values)
	if err != nil {
		return nil, fmt.Errorf("encode verbose info: %w", err)
	}
	return map[string]string{"info": string(raw)}, nil
}

func (c *container) view() *runtimeapi.ContainerStatus {
	st, config := c.status.snapshot(), c.spec.Config
	view := &runtimeapi.ContainerStatus{
		Id: c.spec.ID, Metadata: config.GetMetadata(), State: st.state(), Reason: st.reason(), Message: st.Message,
		CreatedAt: c.spec.CreatedAt.UnixNano(), StartedAt: nanos(st.StartedAt), FinishedAt: nanos(st.FinishedAt),
		ExitCode: int32(st.ExitCode), Image: config.GetImage(), ImageRef: c.spec.ImageRef, ImageId: c.spec.ImageID,
		Labels: config.GetLabels(), Annotations: config.GetAnnotations(), Mounts: config.GetMounts(),
		LogPath: c.spec.LogPath, StopSignal: criSignal(c.spec.StopSignal),
	}
	if view.Message == "" && st.FinishedAt.IsZero() {
		view.Message = strings.Join(c.notApplied(), "; ")
	}
	oci := c.oci()
	if oci == nil {
		return view
	}
	if linux := oci.Linux; linux != nil {
		view.Resources = &runtimeapi.ContainerResources{Linux: resources(linux.Resources, oci.Process)}
	}
	if process := oci.Process; process != nil {
		user := &runtimeapi.LinuxContainerUser{Uid: int64(process.User.UID), Gid: int64(process.User.GID)}
		for _, gid := range process.User.AdditionalGids {
			user.SupplementalGroups = append(user.SupplementalGroups, int64(gid))
		}
		view.User = &runtimeapi.ContainerUser{Linux: user}
	}
	return view
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// resources are those in force: read from the spec that the keeper got, not from what was asked for.
func resources(r *specs.LinuxResources, process *specs.Process) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if process != nil && process.OOMScoreAdj != nil {
		out.OomScoreAdj = int64(*process.OOMScoreAdj)
	}
	if r == nil {
		return out
	}
	if cpu := r.CPU; cpu != nil {
		out.CpusetCpus, out.CpusetMems = cpu.Cpus, cpu.Mems
		out.CpuShares = int64(value(cpu.Shares))
		out.CpuQuota = value(cpu.Quota)
		out.CpuPeriod = int64(value(cpu.Period))
	}
	if memory := r.Memory; memory != nil {
		out.MemoryLimitInBytes, out.MemorySwapLimitInBytes = value(memory.Limit), value(memory.Swap)
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	out.Unified = maps.Clone(r.Unified)
	return out
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// criSignal names a signal as the CRI does, whose enum has numbers of its own.
func criSignal(sig syscall.Signal) runtimeapi.Signal { return signalNames()[sig] }

// signalNames inverts ctr.StopSignal. Of two names for one number the first in the enum counts, the usual one.
var signalNames = sync.OnceValue(func() map[syscall.Signal]runtimeapi.Signal {
	names := map[syscall.Signal]runtimeapi.Signal{}
	for _, number := range slices.Sorted(maps.Keys(runtimeapi.Signal_name)) {
		name := runtimeapi.Signal(number)
		sig, err := ctr.StopSignal(name, "")
		if _, taken := names[sig]; err == nil && !taken && name != runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT {
			names[sig] = name
		}
	}
	return names
})
