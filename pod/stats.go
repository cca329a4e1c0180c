package pod

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// statsParallel bounds how many pods or containers are looked at side by side.
const statsParallel = 4

func (s *Service) containerStats(ctx context.Context, id string) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := s.index.container(id)
	if err != nil {
		return nil, err
	}
	v, done := s.survey(ctx)
	defer done()
	stats, err := v.ofContainer(c)
	return &runtimeapi.ContainerStatsResponse{Stats: stats}, err
}

// listContainerStats "returns stats of all running containers".
func (s *Service) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) ([]*runtimeapi.ContainerStats, error) {
	chosen := slices.DeleteFunc(s.sortedContainers(""), func(c *container) bool {
		return !c.status.snapshot().running() ||
			!strings.HasPrefix(c.spec.ID, f.GetId()) || !strings.HasPrefix(c.spec.PodID, f.GetPodSandboxId()) ||
			!hasLabels(c.spec.Config.GetLabels(), f.GetLabelSelector())
	})
	v, done := s.survey(ctx)
	defer done()
	return lookAtAll(ctx, s, chosen, func(c *container) *runtimeapi.ContainerStats {
		stats, err := v.ofContainer(c)
		return told(v, "container", c.spec.ID, stats, err)
	})
}

func (s *Service) podStats(ctx context.Context, id string) (*runtimeapi.PodSandboxStatsResponse, error) {
	p, err := s.index.pod(id)
	if err != nil {
		return nil, err
	}
	v, done := s.survey(ctx)
	defer done()
	stats, err := v.ofPod(p)
	return &runtimeapi.PodSandboxStatsResponse{Stats: stats}, err
}

// listPodStats lists the pods that are ready: of those that were stopped nothing is counted any more.
func (s *Service) listPodStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) ([]*runtimeapi.PodSandboxStats, error) {
	chosen := slices.DeleteFunc(s.readyPods(), func(p *pod) bool {
		return !strings.HasPrefix(p.spec.ID, f.GetId()) || !hasLabels(p.spec.Config.GetLabels(), f.GetLabelSelector())
	})
	v, done := s.survey(ctx)
	defer done()
	return lookAtAll(ctx, s, chosen, func(p *pod) *runtimeapi.PodSandboxStats {
		stats, err := v.ofPod(p)
		return told(v, "pod", p.spec.ID, stats, err)
	})
}

// readyPods returns the pods that are ready, oldest first.
func (s *Service) readyPods() []*pod {
	return slices.DeleteFunc(s.sortedPods(), func(p *pod) bool { return !p.status.snapshot().ready() })
}

// lookAtAll looks at several things side by side and returns what it finds in their order, without the nils.
func lookAtAll[T, R any](ctx context.Context, s *Service, things []T, look func(T) *R) ([]*R, error) {
	found := make([]*R, len(things))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(statsParallel)
	for i, thing := range things {
		group.Go(s.guarded(func() error {
			if ctx.Err() == nil {
				found[i] = look(thing)
			}
			return ctx.Err()
		}))
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(found, func(r *R) bool { return r == nil }), nil
}

// told leaves out of a list, and logs, what could not be looked at: one broken container must not hide all others from
// the kubelet, which evicts and scales by the list.
func told[R any](v *survey, kind, id string, found *R, err error) *R {
	if err != nil {
		v.cfg.Log.Warn("left out of the stats", kind, id, "error", err)
		return nil
	}
	return found
}

// ofContainer has of a container that does not run the disk use alone. What nobody counts on this node is left out: a
// missing number is not zero.
func (v *survey) ofContainer(c *container) (*runtimeapi.ContainerStats, error) {
	r, err := v.readContainer(c, v.deps.Cgroups.Stats)
	if err != nil {
		return nil, err
	}
	return v.containerMessage(c, r)
}

func (v *survey) containerMessage(c *container, r reading) (*runtimeapi.ContainerStats, error) {
	layer, err := v.layer(c)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{
			Id: c.spec.ID, Metadata: c.spec.Config.GetMetadata(),
			Labels: c.spec.Config.GetLabels(), Annotations: c.spec.Config.GetAnnotations(),
		},
		Cpu: r.cpu(), Memory: r.memory(), Swap: r.swap(), Io: r.io(), WritableLayer: v.filesystem(layer),
	}, nil
}

func (v *survey) ofPod(p *pod) (*runtimeapi.PodSandboxStats, error) {
	linux := &runtimeapi.LinuxPodSandboxStats{}
	var readings []reading
	for _, c := range v.sortedContainers(p.spec.ID) {
		if !c.status.snapshot().running() {
			continue
		}
		r, err := v.readContainer(c, v.deps.Cgroups.Stats)
		if err != nil {
			return nil, err
		}
		if err := v.list(c, &r); err != nil {
			return nil, err
		}
		stats, err := v.containerMessage(c, r)
		if err != nil {
			return nil, err
		}
		readings, linux.Containers = append(readings, r), append(linux.Containers, stats)
	}
	r, err := v.readPod(p, readings)
	if err != nil {
		return nil, err
	}
	linux.Cpu, linux.Memory, linux.Io, linux.Process = r.cpu(), r.memory(), r.io(), countProcesses(p, readings)
	if linux.Network, err = v.network(p); err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStats{Linux: linux, Attributes: &runtimeapi.PodSandboxAttributes{
		Id: p.spec.ID, Metadata: p.spec.Config.GetMetadata(),
		Labels: p.spec.Config.GetLabels(), Annotations: p.spec.Config.GetAnnotations(),
	}}, nil
}
