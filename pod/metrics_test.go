package pod

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

var measuredAt = time.Unix(1700000000, 5)

// allFacts has something for every metric.
func allFacts() *facts {
	f := &facts{
		reading: reading{at: time.Unix(1800000000, 999), stats: *everything()}, startedAt: time.Unix(1600000000, 999),
		traffic:   &netslirp.Traffic{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8},
		limits:    &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512},
		processes: processFacts{count: u64(3), threads: u64(17), files: u64(30), sockets: u64(4), maxFiles: u64(1024)},
		layer:     &images.Usage{Bytes: 4096, Inodes: 2, At: measuredAt},
		disk:      &disk{device: "/dev/sda1", bytes: 1e9, inodes: 1e6, inodesFree: 1e5},
		deviceOf:  func(major, minor uint32) string { return fmt.Sprintf("/dev/d%d%d", major, minor) },
	}
	f.stats.CPU.Usage = u64(5999999999)
	return f
}

var testLabels = []string{"1d", "1d", "image", "namespace", "pod", "container"}

func TestMetricDescriptors(t *testing.T) {
	h := newHarness(t)
	first, err := h.ListMetricDescriptors(h.ctx(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// "This list should be static": what pods there are does not change it.
	h.launchIn(h.run(h.podConfig("p")), "c", "sleep 1000")
	second, err := h.ListMetricDescriptors(h.ctx(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil || !proto.Equal(first, second) {
		t.Errorf("the descriptors have changed: %v", err)
	}
	name, label, seen := regexp.MustCompile(`^container_[a-z_]+$`), regexp.MustCompile(`^[a-z_]+$`), map[string]bool{}
	for _, d := range first.Descriptors {
		if seen[d.Name] || !name.MatchString(d.Name) || !strings.HasSuffix(d.Help, ".") {
			t.Errorf("%v", d)
		}
		seen[d.Name] = true
		if !slices.Equal(d.LabelKeys[:len(labelKeys)], labelKeys) {
			t.Errorf("%s has labels %v", d.Name, d.LabelKeys)
		}
		for i, key := range d.LabelKeys {
			if !label.MatchString(key) || slices.Index(d.LabelKeys, key) != i {
				t.Errorf("%s has label %q", d.Name, key)
			}
		}
	}
	// What the usual dashboards, alerts and recording rules of Kubernetes ask for.
	for _, wanted := range []string{"container_cpu_usage_seconds_total", "container_cpu_cfs_throttled_periods_total", "container_cpu_cfs_periods_total",
		"container_memory_working_set_bytes", "container_memory_rss", "container_memory_cache", "container_memory_swap", "container_memory_usage_bytes",
		"container_memory_failcnt", "container_fs_reads_total", "container_fs_writes_total", "container_fs_reads_bytes_total",
		"container_fs_writes_bytes_total", "container_fs_usage_bytes", "container_network_receive_bytes_total", "container_network_transmit_bytes_total",
		"container_network_receive_packets_total", "container_network_transmit_packets_total", "container_network_receive_packets_dropped_total",
		"container_network_transmit_packets_dropped_total", "container_start_time_seconds", "container_last_seen", "container_oom_events_total",
		"container_spec_memory_limit_bytes", "container_spec_cpu_quota", "container_processes", "container_threads",
		"container_pressure_cpu_waiting_seconds_total"} {
		if !seen[wanted] {
			t.Errorf("%s is not described", wanted)
		}
	}
}

// TestMetricsFitTheirDescriptors: the kubelet drops a metric with more labels or fewer, ends when one has no value, and
// has nothing but an error for Prometheus when two are the same.
func TestMetricsFitTheirDescriptors(t *testing.T) {
	described, unused, seen := map[string]*runtimeapi.MetricDescriptor{}, map[string]bool{}, map[string]bool{}
	for _, d := range descriptors() {
		described[d.Name], unused[d.Name] = d, true
	}
	for _, m := range allFacts().metrics(testLabels) {
		delete(unused, m.Name)
		d := described[m.Name]
		if d == nil || len(m.LabelValues) != len(d.LabelKeys) || !slices.Equal(m.LabelValues[:len(testLabels)], testLabels) || m.Value == nil {
			t.Errorf("%v does not fit %v", m, d)
		}
		if key := fmt.Sprint(m.Name, m.LabelValues); seen[key] {
			t.Errorf("%s is there twice", key)
		} else {
			seen[key] = true
		}
		// Totals grow; what is only a state is no counter.
		if total := strings.HasSuffix(m.Name, "_total") || m.Name == "container_memory_failcnt"; total != (m.MetricType == runtimeapi.MetricType_COUNTER) {
			if m.Name != "container_fs_inodes_total" {
				t.Errorf("%s is a %s", m.Name, m.MetricType)
			}
		}
	}
	if len(unused) > 0 {
		t.Errorf("never told: %v", unused)
	}
}

// TestMetricTimestamps: "Timestamp should be 0 if the metric was gathered live. If it was cached, the Timestamp should
// reflect the time".
func TestMetricTimestamps(t *testing.T) {
	counted, guessed := allFacts(), allFacts()
	guessed.memoryAt = time.Unix(1700000001, 0)
	for _, tc := range []struct {
		facts *facts
		want  map[string]int64
	}{
		{counted, map[string]int64{"container_fs_usage_bytes": measuredAt.UnixNano()}},
		{guessed, map[string]int64{"container_fs_usage_bytes": measuredAt.UnixNano(),
			"container_memory_working_set_bytes": guessed.memoryAt.UnixNano(), "container_memory_rss": guessed.memoryAt.UnixNano()}},
	} {
		for _, m := range tc.facts.metrics(testLabels) {
			if m.Timestamp != tc.want[m.Name] {
				t.Errorf("%s has timestamp %d, want %d", m.Name, m.Timestamp, tc.want[m.Name])
			}
		}
	}
}

func TestMetricValues(t *testing.T) {
	got := map[string]uint64{}
	for _, m := range allFacts().metrics(testLabels) {
		got[strings.Join(append([]string{m.Name}, m.LabelValues[len(testLabels):]...), " ")] = m.Value.Value
	}
	want := map[string]uint64{
		"container_last_seen": 1800000000, "container_start_time_seconds": 1600000000,
		"container_cpu_usage_seconds_total total": 5, "container_cpu_user_seconds_total": 3, "container_cpu_system_seconds_total": 2,
		"container_cpu_cfs_periods_total": 40, "container_cpu_cfs_throttled_periods_total": 4, "container_cpu_cfs_throttled_seconds_total": 5,
		"container_memory_usage_bytes": 1000, "container_memory_max_usage_bytes": 2000, "container_memory_working_set_bytes": 800,
		"container_memory_rss": 300, "container_memory_cache": 500, "container_memory_mapped_file": 50,
		"container_memory_total_active_file_bytes": 250, "container_memory_total_inactive_file_bytes": 200, "container_memory_kernel_usage": 90,
		"container_memory_swap": 60, "container_memory_failcnt": 12,
		"container_memory_failures_total pgfault container": 7, "container_memory_failures_total pgfault hierarchy": 7,
		"container_memory_failures_total pgmajfault container": 6, "container_memory_failures_total pgmajfault hierarchy": 6,
		"container_oom_events_total":         1,
		"container_fs_usage_bytes /dev/sda1": 4096, "container_fs_limit_bytes /dev/sda1": 1e9, "container_fs_inodes_total /dev/sda1": 1e6,
		"container_fs_inodes_free /dev/sda1":        1e5,
		"container_fs_reads_bytes_total /dev/d2501": 11, "container_fs_reads_total /dev/d2501": 14,
		"container_fs_writes_bytes_total /dev/d2501": 12, "container_fs_writes_total /dev/d2501": 15,
		"container_fs_reads_bytes_total /dev/d2512": 16, "container_fs_reads_total /dev/d2512": 0,
		"container_fs_writes_bytes_total /dev/d2512": 0, "container_fs_writes_total /dev/d2512": 0,
		"container_blkio_device_usage_total /dev/d2501 250 1 Read": 11, "container_blkio_device_usage_total /dev/d2501 250 1 Write": 12,
		"container_blkio_device_usage_total /dev/d2501 250 1 Discard": 13, "container_blkio_device_usage_total /dev/d2512 251 2 Read": 16,
		"container_blkio_device_usage_total /dev/d2512 251 2 Write": 0, "container_blkio_device_usage_total /dev/d2512 251 2 Discard": 0,
		"container_network_receive_bytes_total eth0": 1, "container_network_receive_packets_total eth0": 2,
		"container_network_receive_errors_total eth0": 3, "container_network_receive_packets_dropped_total eth0": 4,
		"container_network_transmit_bytes_total eth0": 5, "container_network_transmit_packets_total eth0": 6,
		"container_network_transmit_errors_total eth0": 7, "container_network_transmit_packets_dropped_total eth0": 8,
		"container_processes": 3, "container_threads": 17, "container_threads_max": 100, "container_file_descriptors": 30, "container_sockets": 4,
		"container_ulimits_soft max_open_files": 1024,
		"container_spec_cpu_period":             100000, "container_spec_cpu_quota": 50000, "container_spec_cpu_shares": 512,
		"container_spec_memory_limit_bytes": 5000, "container_spec_memory_swap_limit_bytes": 100, "container_spec_memory_reservation_limit_bytes": 10,
		"container_pressure_cpu_waiting_seconds_total": 4, "container_pressure_cpu_stalled_seconds_total": 5,
		"container_pressure_memory_waiting_seconds_total": 6, "container_pressure_memory_stalled_seconds_total": 7,
		"container_pressure_io_waiting_seconds_total": 8, "container_pressure_io_stalled_seconds_total": 9,
	}
	for key, value := range want {
		if n, told := got[key]; !told || n != value {
			t.Errorf("%s is %d, %v, want %d", key, n, told, value)
		}
		delete(got, key)
	}
	if len(got) > 0 {
		t.Errorf("not expected: %v", got)
	}
}

// TestMetricsThatNobodyCounts are left out; a limit that is not there is zero only where the thing itself is counted.
func TestMetricsThatNobodyCounts(t *testing.T) {
	for _, tc := range []struct {
		name  string
		facts facts
		want  []string
	}{
		{"nothing", facts{}, nil},
		{"no controllers", facts{reading: reading{stats: cgroupv2.Stats{CPU: cgroupv2.CPU{Usage: u64(0), User: u64(0), System: u64(0)}}}},
			[]string{"container_cpu_usage_seconds_total", "container_cpu_user_seconds_total", "container_cpu_system_seconds_total"}},
		{"no limits", facts{reading: reading{stats: cgroupv2.Stats{Memory: cgroupv2.Memory{Usage: u64(1)}, Tasks: u64(1)}}, limits: &runtimeapi.LinuxContainerResources{CpuQuota: -1}},
			[]string{"container_memory_usage_bytes", "container_threads_max", "container_spec_memory_limit_bytes"}},
		{"a filesystem but no measure", facts{disk: &disk{}}, []string{"container_fs_limit_bytes", "container_fs_inodes_total", "container_fs_inodes_free"}},
	} {
		var got []string
		for _, m := range tc.facts.metrics(testLabels) {
			got = append(got, m.Name)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

// metricsOf are the metrics of a running container, by name.
func (h *harness) metricsOf(id string) map[string][]*runtimeapi.Metric {
	h.t.Helper()
	resp, err := h.ListPodSandboxMetrics(h.ctx(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	all := map[string][]*runtimeapi.Metric{}
	for _, p := range resp.PodMetrics {
		for _, c := range p.ContainerMetrics {
			for _, m := range c.Metrics {
				if c.ContainerId == id {
					all[m.Name] = append(all[m.Name], m)
				}
			}
		}
	}
	return all
}

func TestListPodMetrics(t *testing.T) {
	h := newHarness(t)
	h.cgroups.counted = everything()
	if err := os.Mkdir(h.imageRoot(), 0o755); err != nil {
		t.Fatal(err)
	}
	node := h.podConfig("node")
	node.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	a, b, stopped := h.run(h.podConfig("a")), h.run(node), h.run(h.podConfig("stopped"))
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped}); err != nil {
		t.Fatal(err)
	}
	id := h.launchIn(a, "c", "sleep 1000")
	h.exited(h.launchIn(a, "ended", "exit 0"))
	h.create(a, shell("created", "exit 0"))
	h.cgroups.pids = map[string][]int{h.pathOf(id): {h.pidOf(id), os.Getpid()}}
	resp, err := h.ListPodSandboxMetrics(h.ctx(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(resp.PodMetrics) != 2 || resp.PodMetrics[0].PodSandboxId != a || resp.PodMetrics[1].PodSandboxId != b {
		t.Fatalf("%v, %v", resp, err)
	}
	own := resp.PodMetrics[0]
	if len(own.Metrics) != 8 || !slices.Equal(own.Metrics[0].LabelValues, []string{a, a, "", "default", "a", "", "eth0"}) {
		t.Errorf("the pod's own: %v", own.Metrics)
	}
	if shared := resp.PodMetrics[1]; len(shared.Metrics) != 0 || len(shared.ContainerMetrics) != 0 {
		t.Errorf("a pod in the node's network, without a container: %v", shared)
	}
	if len(own.ContainerMetrics) != 1 || own.ContainerMetrics[0].ContainerId != id {
		t.Fatalf("containers: %v", own.ContainerMetrics)
	}
	metrics := h.metricsOf(id)
	if m := metrics["container_cpu_usage_seconds_total"]; len(m) != 1 || !slices.Equal(m[0].LabelValues, []string{id, id, testImage, "default", "a", "c", "total"}) {
		t.Errorf("%v", m)
	}
	for name, want := range map[string]uint64{"container_processes": 2, "container_threads": 17, "container_oom_events_total": 1, "container_memory_cache": 500} {
		if m := metrics[name]; len(m) != 1 || m[0].Value.Value != want {
			t.Errorf("%s: %v, want %d", name, m, want)
		}
	}
	for _, name := range []string{"container_fs_usage_bytes", "container_fs_limit_bytes", "container_sockets", "container_ulimits_soft", "container_start_time_seconds"} {
		if m := metrics[name]; len(m) != 1 {
			t.Errorf("%s: %v", name, m)
		}
	}
	if len(metrics["container_network_receive_bytes_total"]) > 0 {
		t.Error("a container has the network of its pod")
	}
	out := &sink[runtimeapi.StreamPodSandboxMetricsResponse]{ctx: h.ctx()}
	if err := h.StreamPodSandboxMetrics(&runtimeapi.StreamPodSandboxMetricsRequest{}, out); err != nil {
		t.Fatal(err)
	}
	if len(out.messages) != 2 || out.messages[0].PodSandboxMetrics[0].PodSandboxId != a || out.messages[1].PodSandboxMetrics[0].PodSandboxId != b {
		t.Errorf("streamed: %v", out.messages)
	}
}

func TestMetricsNameTheImageAsThePodsAuthorDid(t *testing.T) {
	h := newHarness(t)
	config := shell("c", "sleep 1000")
	config.Image = &runtimeapi.ImageSpec{Image: testImageID, UserSpecifiedImage: "app:1"} // as the kubelet does
	id := h.create(h.run(h.podConfig("p")), config)
	h.start(id)
	if m := h.metricsOf(id)["container_start_time_seconds"]; len(m) != 1 || m[0].LabelValues[2] != "app:1" {
		t.Errorf("%v", m)
	}
}

func TestDeviceName(t *testing.T) {
	if got := deviceName(1023, 7); got != "1023:7" {
		t.Errorf("%q for a device that is not there", got)
	}
	entries, _ := os.ReadDir("/sys/dev/block")
	for _, e := range entries {
		var major, minor uint32
		if _, err := fmt.Sscanf(e.Name(), "%d:%d", &major, &minor); err != nil {
			t.Fatal(err)
		}
		if got := deviceName(major, minor); !strings.HasPrefix(got, "/dev/") {
			t.Errorf("%s is %q", e.Name(), got)
		}
	}
}
