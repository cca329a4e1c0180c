package pod

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/images"
)

// usageTTL is the age up to which the size of a writable layer is told again: to find it, the layer is read
// whole. It is the period in which the kubelet asks.
const usageTTL = 10 * time.Second

// statsParallel bounds how many containers are looked at side by side.
const statsParallel = 4

// usageCache is the last known size of a container's writable layer.
type usageCache struct {
	mu            sync.Mutex // held while the layer is read: who asks meanwhile wants the same answer
	at            time.Time
	bytes, inodes uint64
}

func (s *Service) containerStats(id string) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := s.index.container(id)
	if err != nil {
		return nil, err
	}
	stats, err := s.gather(c)
	return &runtimeapi.ContainerStatsResponse{Stats: stats}, err
}

// listContainerStats "returns stats of all running containers". One that goes while it is looked at is left out.
func (s *Service) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) ([]*runtimeapi.ContainerStats, error) {
	var running []*container
	for _, c := range s.sortedContainers("") {
		if c.status.snapshot().running() &&
			strings.HasPrefix(c.spec.ID, f.GetId()) && strings.HasPrefix(c.spec.PodID, f.GetPodSandboxId()) &&
			hasLabels(c.spec.Config.GetLabels(), f.GetLabelSelector()) {
			running = append(running, c)
		}
	}
	all := make([]*runtimeapi.ContainerStats, len(running))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(statsParallel)
	for i, c := range running {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			stats, err := s.gather(c)
			if err != nil && c.status.snapshot().running() {
				return err
			}
			if err == nil {
				all[i] = stats
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	out := all[:0]
	for _, stats := range all {
		if stats != nil {
			out = append(out, stats)
		}
	}
	return out, nil
}

// gather leaves out what no cgroup controller counts on this node: a missing number is not zero.
func (s *Service) gather(c *container) (*runtimeapi.ContainerStats, error) {
	out := &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{
		Id: c.spec.ID, Metadata: c.spec.Config.GetMetadata(),
		Labels: c.spec.Config.GetLabels(), Annotations: c.spec.Config.GetAnnotations(),
	}}
	layer, err := s.writableLayer(c)
	if err != nil && !errors.Is(err, images.ErrNotFound) { // the store may have lost it with the node
		return nil, err
	}
	out.WritableLayer = layer
	if cgroup := c.cgroup(); cgroup != "" && c.status.snapshot().running() {
		stats, err := s.deps.Cgroups.Stats(cgroup)
		if errors.Is(err, cgroupv2.ErrNotFound) {
			return out, nil // it ended between the two looks
		}
		if err != nil {
			return nil, err
		}
		fill(out, stats, time.Now().UnixNano())
	}
	return out, nil
}

// cgroup is where the keeper put the container.
func (c *container) cgroup() string {
	if c.spec.OCI == nil || c.spec.OCI.Linux == nil {
		return ""
	}
	return c.spec.OCI.Linux.CgroupsPath
}

func (s *Service) writableLayer(c *container) (*runtimeapi.FilesystemUsage, error) {
	u := &c.usage
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.at) > usageTTL {
		bytes, inodes, err := s.deps.Images.RootfsUsage(c.spec.ID)
		if err != nil {
			return nil, err
		}
		u.at, u.bytes, u.inodes = time.Now(), bytes, inodes
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp: u.at.UnixNano(),
		// The path that ImageFsInfo names, by which the kubelet joins the two.
		FsId:      &runtimeapi.FilesystemIdentifier{Mountpoint: filepath.Join(s.cfg.DataDir, "images")},
		UsedBytes: &runtimeapi.UInt64Value{Value: u.bytes}, InodesUsed: &runtimeapi.UInt64Value{Value: u.inodes},
	}, nil
}

func fill(out *runtimeapi.ContainerStats, st cgroupv2.Stats, now int64) {
	if st.CPUUsageNanos != nil || st.CPUPressure != nil {
		out.Cpu = &runtimeapi.CpuUsage{
			Timestamp: now, UsageCoreNanoSeconds: number(st.CPUUsageNanos), Psi: pressure(st.CPUPressure),
		}
	}
	if st.MemoryUsage != nil || st.MemoryPressure != nil {
		out.Memory = &runtimeapi.MemoryUsage{
			Timestamp: now, WorkingSetBytes: number(st.WorkingSet), UsageBytes: number(st.MemoryUsage),
			RssBytes: number(st.RSS), PageFaults: number(st.PageFaults), MajorPageFaults: number(st.MajorPageFaults),
			AvailableBytes: available(st.MemoryLimit, st.WorkingSet), Psi: pressure(st.MemoryPressure),
		}
	}
	if st.SwapUsage != nil {
		out.Swap = &runtimeapi.SwapUsage{Timestamp: now, SwapUsageBytes: number(st.SwapUsage)}
	}
	if st.IOPressure != nil {
		out.Io = &runtimeapi.IoUsage{Timestamp: now, Psi: pressure(st.IOPressure)}
	}
}

func number(v *uint64) *runtimeapi.UInt64Value {
	if v == nil {
		return nil
	}
	return &runtimeapi.UInt64Value{Value: *v}
}

// available: "defined as the memory limit - workingSetBytes".
func available(limit, workingSet *uint64) *runtimeapi.UInt64Value {
	if limit == nil || workingSet == nil {
		return nil
	}
	return &runtimeapi.UInt64Value{Value: *limit - min(*limit, *workingSet)}
}

func pressure(p *cgroupv2.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	line := func(l cgroupv2.PressureLine) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: l.TotalNanos, Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &runtimeapi.PsiStats{Some: line(p.Some), Full: line(p.Full)}
}
