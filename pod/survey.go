package pod

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

// layerWait is how long one call waits, for all containers together, for writable layers that nobody has measured yet:
// those of new containers, in which there is little.
const layerWait = 100 * time.Millisecond

// A survey is one call's look at the node. What is the same for all pods is looked up once, when it is first needed.
type survey struct {
	*Service
	layers  context.Context // ends after layerWait
	traffic func() (map[string]netslirp.Traffic, error)
	census  func() (census, error)
}

func (s *Service) survey(ctx context.Context) (*survey, context.CancelFunc) {
	layers, done := context.WithTimeout(ctx, layerWait)
	return &survey{
		Service: s, layers: layers,
		traffic: sync.OnceValues(s.deps.Network.Usage), census: sync.OnceValues(s.takeCensus),
	}, done
}

// reading is what was counted for a container or a pod. The zero value is that of what does not run.
type reading struct {
	at        time.Time // when the counters were read
	memoryAt  time.Time // when memory was estimated; zero where the kernel counts it
	stats     cgroupv2.Stats
	nanoCores *uint64 // CPU use, ns in a second
	pids      []int   // of a container: its processes, once they were listed
}

// cgroup is where the keeper put the container.
func (c *container) cgroup() string {
	if c.spec.OCI == nil || c.spec.OCI.Linux == nil {
		return ""
	}
	return c.spec.OCI.Linux.CgroupsPath
}

// readContainer asks the kernel, by read, and makes up from /proc what the kernel does not count here (census.go).
func (v *survey) readContainer(c *container, read func(path string) (cgroupv2.Stats, error)) (reading, error) {
	if !c.status.snapshot().running() {
		return reading{}, nil
	}
	r := reading{at: time.Now()}
	if cgroup := c.cgroup(); cgroup != "" {
		var err error
		if r.stats, err = read(cgroup); errors.Is(err, cgroupv2.ErrNotFound) {
			return reading{}, nil // it ended between the two looks
		} else if err != nil {
			return reading{}, err
		}
	}
	if err := v.estimate(c, &r); err != nil {
		return reading{}, err
	}
	r.meter(&c.cpu)
	return r, nil
}

// readPod reads the pod's cgroup; what the kernel does not count is summed up from that of its containers.
func (v *survey) readPod(p *pod, containers []reading) (reading, error) {
	r := reading{at: time.Now()}
	if cgroup := p.status.snapshot().Cgroup; cgroup != "" {
		var err error
		if r.stats, err = v.deps.Cgroups.Stats(cgroup); errors.Is(err, cgroupv2.ErrNotFound) {
			return reading{}, nil // it went with the pod, or with the life of the node in which the pod was run
		} else if err != nil {
			return reading{}, err
		}
	}
	if r.stats.CPU.Usage == nil {
		total := uint64(0)
		for _, c := range v.index.allContainers(p.spec.ID) { // those that have ended, too: the pod has used their time
			total += c.cpu.last()
		}
		r.stats.CPU.Usage = &total
	}
	if r.stats.Memory.Usage == nil {
		for _, c := range containers {
			r.memoryAt = oldest(r.memoryAt, c.memoryAt)
			r.stats.Memory.WorkingSet = add(r.stats.Memory.WorkingSet, c.stats.Memory.WorkingSet)
			r.stats.Memory.RSS = add(r.stats.Memory.RSS, c.stats.Memory.RSS)
		}
	}
	r.meter(&p.cpu)
	return r, nil
}

// oldest is the earlier of two times, of which a zero one is none.
func oldest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// add is nil where there is nothing to add up.
func add(sum, n *uint64) *uint64 {
	if n == nil {
		return sum
	}
	total := value(sum) + *n
	return &total
}

func (r *reading) meter(m *cpuMeter) {
	if r.stats.CPU.Usage == nil {
		return
	}
	total, rate := m.observe(r.at, *r.stats.CPU.Usage)
	r.stats.CPU.Usage, r.nanoCores = &total, rate
}

// countProcesses counts those of a pod's containers, and its pause process.
func countProcesses(p *pod, containers []reading) *runtimeapi.ProcessUsage {
	n := uint64(0)
	for _, c := range containers {
		n += uint64(len(c.pids))
	}
	if st := p.status.snapshot(); st.ready() && st.PausePid != 0 {
		n++
	}
	return &runtimeapi.ProcessUsage{Timestamp: time.Now().UnixNano(), ProcessCount: number(&n)}
}

// layer is the last measure of what the container wrote; nil where there is none yet, or no layer any more.
func (v *survey) layer(c *container) (*images.Usage, error) {
	usage, err := v.deps.Images.RootfsUsage(v.layers, c.spec.ID)
	if errors.Is(err, images.ErrNotFound) || errors.Is(err, context.DeadlineExceeded) {
		return nil, nil // the store may have lost it with the node; or layerWait is over
	}
	if err != nil {
		return nil, err
	}
	return &usage, nil
}

// imageRoot is the path that ImageFsInfo names, by which the kubelet joins the two.
func (s *Service) imageRoot() string { return filepath.Join(s.cfg.DataDir, "images") }

func (v *survey) filesystem(u *images.Usage) *runtimeapi.FilesystemUsage {
	if u == nil {
		return nil
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp: u.At.UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: v.imageRoot()},
		UsedBytes: number(&u.Bytes), InodesUsed: number(&u.Inodes),
	}
}

// podTraffic is nil for a pod in the node's network, whose interfaces it shares with everybody there, and for one that
// is being detached.
func (v *survey) podTraffic(p *pod) (*netslirp.Traffic, error) {
	if p.hostNetwork() || !p.status.snapshot().ready() {
		return nil, nil
	}
	all, err := v.traffic()
	if err != nil {
		return nil, fmt.Errorf("read network stats: %w", err)
	}
	if t, ok := all[p.spec.ID]; ok {
		return &t, nil
	}
	return nil, nil
}

// network has one interface, since a pod has no other but its loopback.
func (v *survey) network(p *pod) (*runtimeapi.NetworkUsage, error) {
	t, err := v.podTraffic(p)
	if t == nil {
		return nil, err
	}
	return &runtimeapi.NetworkUsage{Timestamp: time.Now().UnixNano(), DefaultInterface: &runtimeapi.NetworkInterfaceUsage{
		Name: t.Name, RxBytes: number(&t.RxBytes), RxErrors: number(&t.RxErrors), TxBytes: number(&t.TxBytes), TxErrors: number(&t.TxErrors),
	}}, nil
}

func (r reading) cpu() *runtimeapi.CpuUsage {
	if r.stats.CPU.Usage == nil && r.stats.CPUPressure == nil {
		return nil
	}
	return &runtimeapi.CpuUsage{Timestamp: r.at.UnixNano(), UsageCoreNanoSeconds: number(r.stats.CPU.Usage),
		UsageNanoCores: number(r.nanoCores), Psi: pressure(r.stats.CPUPressure)}
}

func (r reading) memory() *runtimeapi.MemoryUsage {
	m := r.stats.Memory
	if m.WorkingSet == nil && r.stats.MemoryPressure == nil {
		return nil
	}
	return &runtimeapi.MemoryUsage{
		Timestamp: oldest(r.at, r.memoryAt).UnixNano(), WorkingSetBytes: number(m.WorkingSet), UsageBytes: number(m.Usage),
		RssBytes: number(m.RSS), PageFaults: number(m.Faults), MajorPageFaults: number(m.MajorFaults),
		AvailableBytes: left(m.Limit, m.WorkingSet), Psi: pressure(r.stats.MemoryPressure),
	}
}

func (r reading) swap() *runtimeapi.SwapUsage {
	m := r.stats.Memory
	if m.Swap == nil {
		return nil
	}
	return &runtimeapi.SwapUsage{Timestamp: r.at.UnixNano(), SwapUsageBytes: number(m.Swap), SwapAvailableBytes: left(m.SwapLimit, m.Swap)}
}

func (r reading) io() *runtimeapi.IoUsage {
	if r.stats.IOPressure == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: r.at.UnixNano(), Psi: pressure(r.stats.IOPressure)}
}

func number(v *uint64) *runtimeapi.UInt64Value {
	if v == nil {
		return nil
	}
	return &runtimeapi.UInt64Value{Value: *v}
}

// left is what a limit leaves, as the CRI defines what is available: of memory "the memory limit - workingSetBytes", of
// swap "the swap limit - swapUsageBytes". Without a limit there is no such number.
func left(limit, used *uint64) *runtimeapi.UInt64Value {
	if limit == nil || used == nil {
		return nil
	}
	return &runtimeapi.UInt64Value{Value: *limit - min(*limit, *used)}
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
