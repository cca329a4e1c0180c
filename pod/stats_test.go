package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
)

// sink is the client's end of a stream.
type sink[T any] struct {
	grpc.ServerStream
	ctx      context.Context
	messages []*T
}

func (s *sink[T]) Context() context.Context { return s.ctx }

func (s *sink[T]) Send(m *T) error {
	s.messages = append(s.messages, m)
	return nil
}

func u64(n uint64) *uint64 { return &n }

// everything is what a kernel with all controllers counts.
func everything() *cgroupv2.Stats {
	return &cgroupv2.Stats{
		CPU: cgroupv2.CPU{User: u64(3e9), System: u64(2e9), Periods: u64(40), Throttled: u64(4), ThrottledTime: u64(5e9)},
		Memory: cgroupv2.Memory{Usage: u64(1000), Limit: u64(5000), WorkingSet: u64(800), RSS: u64(300), Swap: u64(60), SwapLimit: u64(100),
			Faults: u64(7), MajorFaults: u64(6), Cache: u64(500), MappedFile: u64(50), ActiveFile: u64(250), InactiveFile: u64(200),
			Kernel: u64(90), Min: u64(10), Peak: u64(2000), LimitHits: u64(12), OOMKills: u64(1)},
		CPUPressure:    &cgroupv2.Pressure{Some: cgroupv2.PressureLine{Avg10: 1, Avg60: 2, Avg300: 3, TotalNanos: 4e9}, Full: cgroupv2.PressureLine{TotalNanos: 5e9}},
		MemoryPressure: &cgroupv2.Pressure{Some: cgroupv2.PressureLine{TotalNanos: 6e9}, Full: cgroupv2.PressureLine{TotalNanos: 7e9}},
		IOPressure:     &cgroupv2.Pressure{Some: cgroupv2.PressureLine{TotalNanos: 8e9}, Full: cgroupv2.PressureLine{TotalNanos: 9e9}},
		IO: []cgroupv2.DeviceIO{{Major: 250, Minor: 1, ReadBytes: 11, WriteBytes: 12, DiscardBytes: 13, Reads: 14, Writes: 15},
			{Major: 251, Minor: 2, ReadBytes: 16}},
		Tasks: u64(17), TasksMax: u64(100),
	}
}

func (h *harness) stats(id string) *runtimeapi.ContainerStats {
	h.t.Helper()
	resp, err := h.ContainerStats(h.ctx(), &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Stats
}

func (h *harness) statsOfPod(id string) *runtimeapi.PodSandboxStats {
	h.t.Helper()
	resp, err := h.PodSandboxStats(h.ctx(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Stats
}

// pathOf is the cgroup of a container, and pidOf its first process.
func (h *harness) pathOf(id string) string {
	h.t.Helper()
	c, err := h.index.container(id)
	if err != nil {
		h.t.Fatal(err)
	}
	return c.cgroup()
}

func (h *harness) pidOf(id string) int {
	h.t.Helper()
	c, err := h.index.container(id)
	if err != nil {
		h.t.Fatal(err)
	}
	return c.status.snapshot().Pid
}

// same compares but for timestamps, which must be there.
func same(t *testing.T, what string, got, want proto.Message, stamps ...*int64) {
	t.Helper()
	for _, at := range stamps {
		if age := time.Since(time.Unix(0, *at)); age < 0 || age > time.Minute {
			t.Errorf("%s: timestamp %d", what, *at)
		}
		*at = 0
	}
	if !proto.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestContainerStats(t *testing.T) {
	h := newHarness(t)
	h.cgroups.counted = everything()
	id := h.launchIn(h.run(h.podConfig("p")), "c", "sleep 1000")
	st := h.stats(id)
	some := func(total uint64) *runtimeapi.PsiData { return &runtimeapi.PsiData{Total: total} }
	same(t, "cpu", st.Cpu, &runtimeapi.CpuUsage{UsageCoreNanoSeconds: number(u64(1e9)), Psi: &runtimeapi.PsiStats{
		Some: &runtimeapi.PsiData{Total: 4e9, Avg10: 1, Avg60: 2, Avg300: 3}, Full: some(5e9)}}, &st.Cpu.Timestamp)
	same(t, "memory", st.Memory, &runtimeapi.MemoryUsage{WorkingSetBytes: number(u64(800)), AvailableBytes: number(u64(4200)), UsageBytes: number(u64(1000)),
		RssBytes: number(u64(300)), PageFaults: number(u64(7)), MajorPageFaults: number(u64(6)),
		Psi: &runtimeapi.PsiStats{Some: some(6e9), Full: some(7e9)}}, &st.Memory.Timestamp)
	same(t, "swap", st.Swap, &runtimeapi.SwapUsage{SwapUsageBytes: number(u64(60)), SwapAvailableBytes: number(u64(40))}, &st.Swap.Timestamp)
	same(t, "io", st.Io, &runtimeapi.IoUsage{Psi: &runtimeapi.PsiStats{Some: some(8e9), Full: some(9e9)}}, &st.Io.Timestamp)
	layer := st.WritableLayer
	if now := time.Now(); layer.Timestamp > now.Add(-time.Second).UnixNano() || layer.FsId.Mountpoint != h.cfg.DataDir+"/images" {
		t.Errorf("writable layer %v: it was measured a second ago", layer)
	}
	if layer.UsedBytes.GetValue() == 0 || layer.InodesUsed.GetValue() != 3 {
		t.Errorf("writable layer %v", layer)
	}
	if a := st.Attributes; a.Id != id || a.Metadata.Name != "c" || a.Labels["name"] != "c" || a.Annotations["a"] != "b" {
		t.Errorf("attributes %v", a)
	}
	// A second reading, as if the first had been ten seconds ago: 1 s of CPU time more.
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	c.cpu.newer.at = c.cpu.newer.at.Add(-10 * time.Second)
	if cores := h.stats(id).Cpu.UsageNanoCores.GetValue(); cores < 9e7 || cores > 1e8 {
		t.Errorf("%d nanocores, want about a tenth of a core", cores)
	}
}

func TestStatsOfAContainerThatDoesNotRun(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	created, ended := h.create(pod, shell("created", "exit 0")), h.launchIn(pod, "ended", "exit 0")
	h.exited(ended)
	for _, id := range []string{created, ended} {
		if st := h.stats(id); st.Attributes.Id != id || st.WritableLayer == nil || st.Cpu != nil || st.Memory != nil || st.Swap != nil || st.Io != nil {
			t.Errorf("%v", st)
		}
	}
	_, err := h.ContainerStats(h.ctx(), &runtimeapi.ContainerStatsRequest{ContainerId: "nope"})
	wantCode(t, err, codes.NotFound)
}

func TestListContainerStats(t *testing.T) {
	h := newHarness(t)
	podA, podB := h.run(h.podConfig("a")), h.run(h.podConfig("b"))
	a, b := h.launchIn(podA, "x", "sleep 1000"), h.launchIn(podB, "y", "sleep 1000")
	h.exited(h.launchIn(podA, "ended", "exit 0"))
	h.create(podA, shell("created", "exit 0"))
	for _, tc := range []struct {
		filter *runtimeapi.ContainerStatsFilter
		want   []string
	}{
		{nil, []string{a, b}},
		{&runtimeapi.ContainerStatsFilter{}, []string{a, b}},
		{&runtimeapi.ContainerStatsFilter{Id: b}, []string{b}},
		{&runtimeapi.ContainerStatsFilter{Id: a[:12]}, []string{a}},
		{&runtimeapi.ContainerStatsFilter{Id: "none"}, nil},
		{&runtimeapi.ContainerStatsFilter{PodSandboxId: podB}, []string{b}},
		{&runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{"name": "y"}}, []string{b}},
		{&runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{"name": "y"}, PodSandboxId: podA}, nil},
	} {
		list, err := h.ListContainerStats(h.ctx(), &runtimeapi.ListContainerStatsRequest{Filter: tc.filter})
		if err != nil {
			t.Fatal(err)
		}
		out := &sink[runtimeapi.StreamContainerStatsResponse]{ctx: h.ctx()}
		if err := h.StreamContainerStats(&runtimeapi.StreamContainerStatsRequest{Filter: tc.filter}, out); err != nil {
			t.Fatal(err)
		}
		var got, streamed []string
		for _, st := range list.Stats {
			got = append(got, st.Attributes.Id)
		}
		for _, m := range out.messages {
			for _, st := range m.ContainerStats {
				streamed = append(streamed, st.Attributes.Id)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) || fmt.Sprint(streamed) != fmt.Sprint(tc.want) {
			t.Errorf("%v: got %v, streamed %v, want %v", tc.filter, got, streamed, tc.want)
		}
	}
	gone, cancel := context.WithCancel(h.ctx())
	cancel()
	_, err := h.ListContainerStats(gone, &runtimeapi.ListContainerStatsRequest{})
	wantCode(t, err, codes.Canceled)
}

func TestPodStats(t *testing.T) {
	h := newHarness(t)
	h.cgroups.counted = everything()
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 1000")
	h.exited(h.launchIn(pod, "ended", "exit 0"))
	h.cgroups.pids = map[string][]int{h.pathOf(id): {h.pidOf(id), os.Getpid()}}
	st := h.statsOfPod(pod)
	if a := st.Attributes; a.Id != pod || a.Metadata.Name != "p" || a.Labels["app"] != "p" || a.Annotations["note/p"] == "" {
		t.Errorf("attributes %v", a)
	}
	linux := st.Linux
	if len(linux.Containers) != 1 || linux.Containers[0].Attributes.Id != id || linux.Containers[0].Memory.WorkingSetBytes.GetValue() != 800 {
		t.Errorf("containers %v", linux.Containers)
	}
	if linux.Cpu.UsageCoreNanoSeconds.GetValue() != 2e9 || linux.Cpu.Psi.Full.Total != 5e9 || linux.Memory.WorkingSetBytes.GetValue() != 800 ||
		linux.Io.Psi.Some.Total != 8e9 {
		t.Errorf("%v", linux)
	}
	same(t, "process", linux.Process, &runtimeapi.ProcessUsage{ProcessCount: number(u64(2))}, &linux.Process.Timestamp)
	same(t, "network", linux.Network, &runtimeapi.NetworkUsage{DefaultInterface: &runtimeapi.NetworkInterfaceUsage{Name: "eth0",
		RxBytes: number(u64(1)), RxErrors: number(u64(3)), TxBytes: number(u64(5)), TxErrors: number(u64(7))}}, &linux.Network.Timestamp)
	p, err := h.index.pod(pod)
	if err != nil {
		t.Fatal(err)
	}
	p.cpu.newer.at = p.cpu.newer.at.Add(-10 * time.Second) // the kubelet does not compute this one for itself
	if cores := h.statsOfPod(pod).Linux.Cpu.UsageNanoCores.GetValue(); cores < 1.9e8 || cores > 2e8 {
		t.Errorf("%d nanocores, want about a fifth of a core", cores)
	}
	_, err = h.PodSandboxStats(h.ctx(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: "nope"})
	wantCode(t, err, codes.NotFound)
}

func TestListPodStats(t *testing.T) {
	h := newHarness(t)
	node := h.podConfig("node")
	node.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	a, b, stopped := h.run(h.podConfig("a")), h.run(node), h.run(h.podConfig("stopped"))
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		filter *runtimeapi.PodSandboxStatsFilter
		want   []string
	}{
		{nil, []string{a, b}},
		{&runtimeapi.PodSandboxStatsFilter{Id: b[:12]}, []string{b}},
		{&runtimeapi.PodSandboxStatsFilter{Id: stopped}, nil},
		{&runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "a"}}, []string{a}},
		{&runtimeapi.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "a"}, Id: b}, nil},
	} {
		list, err := h.ListPodSandboxStats(h.ctx(), &runtimeapi.ListPodSandboxStatsRequest{Filter: tc.filter})
		if err != nil {
			t.Fatal(err)
		}
		out := &sink[runtimeapi.StreamPodSandboxStatsResponse]{ctx: h.ctx()}
		if err := h.StreamPodSandboxStats(&runtimeapi.StreamPodSandboxStatsRequest{Filter: tc.filter}, out); err != nil {
			t.Fatal(err)
		}
		var got, streamed []string
		for _, st := range list.Stats {
			got = append(got, st.Attributes.Id)
			if hasNetwork := st.Linux.Network != nil; hasNetwork != (st.Attributes.Id == a) {
				t.Errorf("pod %s, network %v: a pod in the node's network has none of its own", st.Attributes.Metadata.Name, st.Linux.Network)
			}
		}
		for _, m := range out.messages {
			for _, st := range m.PodSandboxStats {
				streamed = append(streamed, st.Attributes.Id)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) || fmt.Sprint(streamed) != fmt.Sprint(tc.want) {
			t.Errorf("%v: got %v, streamed %v, want %v", tc.filter, got, streamed, tc.want)
		}
	}
	if st := h.statsOfPod(stopped); st.Attributes.Id != stopped || st.Linux.Network != nil {
		t.Errorf("a stopped pod that is asked for by its id: %v", st)
	}
}

// TestWhatCannotBeReadHidesNothingElse: the kubelet evicts and scales by the lists.
func TestWhatCannotBeReadHidesNothingElse(t *testing.T) {
	h := newHarness(t)
	good, bad := h.run(h.podConfig("good")), h.run(h.podConfig("bad"))
	a, b := h.launchIn(good, "a", "sleep 1000"), h.launchIn(bad, "b", "sleep 1000")
	h.cgroups.set("stats of "+h.pathOf(b), errors.New("boom"))
	list, err := h.ListContainerStats(h.ctx(), &runtimeapi.ListContainerStatsRequest{})
	if err != nil || len(list.Stats) != 1 || list.Stats[0].Attributes.Id != a {
		t.Errorf("%v, %v", list, err)
	}
	pods, err := h.ListPodSandboxStats(h.ctx(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(pods.Stats) != 1 || pods.Stats[0].Attributes.Id != good {
		t.Errorf("%v, %v", pods, err)
	}
	metrics, err := h.ListPodSandboxMetrics(h.ctx(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(metrics.PodMetrics) != 1 || metrics.PodMetrics[0].PodSandboxId != good {
		t.Errorf("%v, %v", metrics, err)
	}
	_, err = h.ContainerStats(h.ctx(), &runtimeapi.ContainerStatsRequest{ContainerId: b})
	wantCode(t, err, codes.Internal)
	_, err = h.PodSandboxStats(h.ctx(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: bad})
	wantCode(t, err, codes.Internal)
}

// TestStatsDoNotWaitForLayers: to measure one may take longer than the kubelet waits.
func TestStatsDoNotWaitForLayers(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	for i := range 3 {
		h.launchIn(pod, "c"+strconv.Itoa(i), "sleep 1000")
	}
	h.images.unmeasured = true
	list, err := h.ListContainerStats(h.ctx(), &runtimeapi.ListContainerStatsRequest{})
	if err != nil || len(list.Stats) != 3 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, st := range list.Stats {
		if st.WritableLayer != nil || st.Cpu == nil {
			t.Errorf("%v", st)
		}
	}
}
