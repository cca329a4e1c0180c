package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

// Metrics have cAdvisor's names and labels, since the kubelet serves them in its place at /metrics/cadvisor, where
// dashboards and alerts look for those (KEP-2371). The kubelet makes a Prometheus metric of each as it is: it neither
// scales nor rounds, so what is called seconds is seconds, in whole ones, as the CRI has only integers. One whose labels
// are not as many as those of its descriptor it drops; two of the same name and labels spoil its whole answer.

// labelKeys are those of every metric. id and name are both the container's id: where cAdvisor would put the path of the
// cgroup, containerd and CRI-O put it, too.
var labelKeys = []string{"id", "name", "image", "namespace", "pod", "container"}

// labels are the values of labelKeys. A pod's own metrics have no container and no image: there is none of the two
// that would stand for it.
func (p *pod) labels() []string {
	m := p.spec.Config.GetMetadata()
	return []string{p.spec.ID, p.spec.ID, "", m.GetNamespace(), m.GetName(), ""}
}

func (c *container) labels(p *pod) []string {
	m, image := p.spec.Config.GetMetadata(), c.spec.Config.GetImage()
	name := image.GetUserSpecifiedImage() // as the pod's author wrote it; image is an id when the kubelet asks
	if name == "" {
		name = image.GetImage()
	}
	return []string{c.spec.ID, c.spec.ID, name, m.GetNamespace(), m.GetName(), c.spec.Config.GetMetadata().GetName()}
}

// facts are what the metrics of a container, or of a pod, are made of. What is nil or has no entry nobody counts.
type facts struct {
	reading
	traffic   *netslirp.Traffic // a pod's, all else is a container's
	startedAt time.Time
	limits    *runtimeapi.LinuxContainerResources // those in force
	processes processFacts
	layer     *images.Usage
	disk      *disk
	deviceOf  func(major, minor uint32) string
}

// processFacts are summed up over the processes of a container.
type processFacts struct {
	count, threads, files, sockets *uint64
	maxFiles                       *uint64 // RLIMIT_NOFILE of the first process
}

// disk is the filesystem of the writable layers.
type disk struct {
	device                    string
	bytes, inodes, inodesFree uint64
}

// descriptors describe all that put may be called with.
func descriptors() []*runtimeapi.MetricDescriptor {
	out := make([]*runtimeapi.MetricDescriptor, len(families))
	for i, f := range families {
		out[i] = &runtimeapi.MetricDescriptor{Name: f.name, Help: f.help, LabelKeys: slices.Concat(labelKeys, f.keys)}
	}
	return out
}

// metrics turns facts into metrics. Their timestamp is zero, which says "now", but for those that were known before.
func (f *facts) metrics(labels []string) []*runtimeapi.Metric {
	var out []*runtimeapi.Metric
	for i := range families {
		family := &families[i]
		at := int64(0)
		if family.at != nil {
			at = nanos(family.at(f))
		}
		family.read(f, func(value *uint64, more ...string) {
			if value == nil {
				return
			}
			values := labels
			if len(more) > 0 {
				values = slices.Concat(labels, more)
			}
			out = append(out, &runtimeapi.Metric{Name: family.name, MetricType: family.kind, Timestamp: at, LabelValues: values,
				Value: &runtimeapi.UInt64Value{Value: *value}})
		})
	}
	return out
}

// listPodMetrics looks at the pods that are ready.
func (s *Service) listPodMetrics(ctx context.Context) ([]*runtimeapi.PodSandboxMetrics, error) {
	v, done := s.survey(ctx)
	defer done()
	disk := s.disk()
	return lookAtAll(ctx, s, s.readyPods(), func(p *pod) *runtimeapi.PodSandboxMetrics {
		metrics, err := v.podMetrics(p, disk)
		return told(v, "pod", p.spec.ID, metrics, err)
	})
}

func (v *survey) podMetrics(p *pod, disk *disk) (*runtimeapi.PodSandboxMetrics, error) {
	traffic, err := v.podTraffic(p)
	if err != nil {
		return nil, err
	}
	own := facts{traffic: traffic}
	out := &runtimeapi.PodSandboxMetrics{PodSandboxId: p.spec.ID, Metrics: own.metrics(p.labels())}
	for _, c := range v.sortedContainers(p.spec.ID) {
		if !c.status.snapshot().running() {
			continue
		}
		f, err := v.factsOf(c)
		if err != nil {
			return nil, err
		}
		f.disk, f.deviceOf = disk, deviceName
		out.ContainerMetrics = append(out.ContainerMetrics, &runtimeapi.ContainerMetrics{ContainerId: c.spec.ID, Metrics: f.metrics(c.labels(p))})
	}
	return out, nil
}

func (v *survey) factsOf(c *container) (f facts, err error) {
	st := c.status.snapshot()
	f.startedAt, f.limits = st.StartedAt, c.view().GetResources().GetLinux()
	if f.reading, err = v.readContainer(c, v.deps.Cgroups.Details); err != nil {
		return f, err
	}
	if f.layer, err = v.layer(c); err != nil {
		return f, err
	}
	if err := v.list(c, &f.reading); err != nil || len(f.pids) == 0 {
		return f, err // without a process it has just ended
	}
	f.processes, err = lookInto(f.pids)
	if f.stats.Tasks != nil {
		f.processes.threads = f.stats.Tasks
	}
	if now, gone := ctr.ReadProcess(st.Pid); gone == nil && now.Start == st.PidStart {
		var limit unix.Rlimit
		if unix.Prlimit(st.Pid, unix.RLIMIT_NOFILE, nil, &limit) == nil {
			f.processes.maxFiles = &limit.Cur
		}
	}
	return f, err
}

// lookInto sums up over processes. Those that end meanwhile do not count; of files the sum is left out where one of them
// may not be looked into.
func lookInto(pids []int) (processFacts, error) {
	count, threads, files, sockets := uint64(len(pids)), uint64(0), uint64(0), uint64(0)
	sums := processFacts{count: &count, threads: &threads, files: &files, sockets: &sockets}
	for _, pid := range pids {
		p, err := ctr.ReadProcess(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return sums, err
		}
		threads += p.Threads
		n, s, err := ctr.ProcessFiles(pid)
		if errors.Is(err, fs.ErrPermission) {
			sums.files, sums.sockets = nil, nil
		} else if err != nil {
			return sums, err
		}
		files, sockets = files+n, sockets+s
	}
	return sums, nil
}

// disk is nil where the filesystem cannot be asked, which the image service tells better.
func (s *Service) disk() *disk {
	var st unix.Statfs_t
	var dir unix.Stat_t
	if unix.Statfs(s.imageRoot(), &st) != nil || unix.Stat(s.imageRoot(), &dir) != nil {
		return nil
	}
	return &disk{
		device: deviceName(unix.Major(dir.Dev), unix.Minor(dir.Dev)),
		bytes:  st.Blocks * uint64(st.Frsize), inodes: st.Files, inodesFree: st.Ffree,
	}
}

// deviceName is the path of a block device as cAdvisor has it, or its numbers where it has none: a filesystem may be on
// several devices, or on none.
func deviceName(major, minor uint32) string {
	raw, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", major, minor))
	if err == nil {
		for line := range bytes.Lines(raw) {
			if name, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("DEVNAME=")); ok {
				return "/dev/" + string(name)
			}
		}
	}
	return strconv.FormatUint(uint64(major), 10) + ":" + strconv.FormatUint(uint64(minor), 10)
}
