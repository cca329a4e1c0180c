package pod

import (
	"os"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/ctr"
)

// busy computes, in a child, and then waits: with 30 MB in memory.
const busy = `(i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done); x=$(head -c 8000000 /dev/zero | tr '\0' x); echo ready; sleep 1000; : $x`

func TestStatsWithoutCgroups(t *testing.T) {
	h := newHarness(t)
	h.cgroups.absent = true
	config := h.podConfig("p")
	config.Linux.SecurityContext.NamespaceOptions.Pid = modePod // with a pause process
	pod := h.run(config)
	id := h.launchIn(pod, "c", busy)
	idle := h.launchIn(pod, "idle", "exec sleep 1000")
	eventually(t, func() bool {
		raw, _ := os.ReadFile(h.status(id).LogPath)
		return len(raw) > 0
	})
	st := h.stats(id)
	if st.Cpu.GetUsageCoreNanoSeconds().GetValue() < 1e7 || st.Cpu.Timestamp == 0 || st.Cpu.Psi != nil {
		t.Errorf("cpu %v of a shell whose child has counted to 100,000", st.Cpu)
	}
	m := st.Memory
	if m.GetWorkingSetBytes().GetValue() < 8e6 || m.GetRssBytes().GetValue() < 8e6 || m.UsageBytes != nil || m.AvailableBytes != nil || m.PageFaults != nil {
		t.Errorf("memory %v of a shell that holds 8 MB", m)
	}
	if st.Swap != nil || st.Io != nil {
		t.Errorf("%v: nobody counts that", st)
	}
	// The pause process, the shell and its sleep, which begins after the word is in the log, and the idle sleep.
	eventually(t, func() bool { return h.statsOfPod(pod).Linux.Process.ProcessCount.Value == 4 })
	linux := h.statsOfPod(pod).Linux
	if len(linux.Containers) != 2 || linux.Cpu.UsageCoreNanoSeconds.Value < st.Cpu.UsageCoreNanoSeconds.Value ||
		linux.Memory.WorkingSetBytes.Value <= h.stats(idle).Memory.WorkingSetBytes.Value+8e6 {
		t.Errorf("%v", linux)
	}
	metrics := h.metricsOf(id)
	for name, least := range map[string]uint64{"container_memory_working_set_bytes": 8e6, "container_processes": 2, "container_threads": 2,
		"container_file_descriptors": 6} {
		if len(metrics[name]) != 1 || metrics[name][0].Value.Value < least {
			t.Errorf("%s: %v, want at least %d", name, metrics[name], least)
		}
	}
	// What a process has used that has ended is not taken back.
	before := linux.Cpu.UsageCoreNanoSeconds.Value
	h.stop(id, 0)
	if now := h.statsOfPod(pod).Linux.Cpu.UsageCoreNanoSeconds.Value; now < before {
		t.Errorf("the pod's CPU time went back from %d to %d", before, now)
	}
	list, err := h.ListContainerStats(h.ctx(), &runtimeapi.ListContainerStatsRequest{})
	if err != nil || len(list.Stats) != 1 || list.Stats[0].Memory.GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("%v, %v", list, err)
	}
}

func TestStatsWithoutTheMemoryController(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 1000")
	h.cgroups.pids = map[string][]int{h.pathOf(id): {h.pidOf(id), 1 << 30}} // the second has just ended
	st := h.stats(id)
	if st.Cpu.UsageCoreNanoSeconds.Value != 1e9 || st.Cpu.Psi == nil {
		t.Errorf("cpu %v, want what the kernel counts", st.Cpu)
	}
	if st.Memory.GetWorkingSetBytes().GetValue() == 0 || st.Memory.UsageBytes != nil {
		t.Errorf("memory %v", st.Memory)
	}
	if m := h.statsOfPod(pod).Linux.Memory; m.GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("the pod's memory %v", m)
	}
	h.cgroups.pids = nil
	h.cgroups.counted = &cgroupv2.Stats{MemoryPressure: &cgroupv2.Pressure{}}
	if m := h.stats(id).Memory; m.GetTimestamp() == 0 || m.Psi == nil || m.WorkingSetBytes != nil {
		t.Errorf("memory %v of a container without a process: its pressure is known, its size is not", m)
	}
}

// TestMemoryEstimateIsNotMadeAgainAtOnce: to ask the kernel costs the more, the larger the process is.
func TestMemoryEstimateIsNotMadeAgainAtOnce(t *testing.T) {
	var m memoryEstimate
	ask := func(pids ...int) (r reading) {
		t.Helper()
		if err := m.renew(pids); err != nil {
			t.Fatal(err)
		}
		m.tell(&r)
		return r
	}
	first := ask(os.Getpid())
	if first.memoryAt.IsZero() || *first.stats.Memory.WorkingSet == 0 || *first.stats.Memory.RSS == 0 {
		t.Fatalf("%+v", first)
	}
	m.took = time.Hour
	if again := ask(); again.memoryAt != first.memoryAt || *again.stats.Memory.WorkingSet != *first.stats.Memory.WorkingSet {
		t.Errorf("%+v, want what was found before, %+v", again, first)
	}
	m.took = 0
	if again := ask(); !again.memoryAt.After(first.memoryAt) || *again.stats.Memory.WorkingSet != 0 {
		t.Errorf("%+v, want a new estimate", again)
	}
}

// TestCensus: processes as they may be found in /proc.
func TestCensus(t *testing.T) {
	const node, one, two, own = 10, 11, 12, 13
	procs := []ctr.Process{
		{Pid: 1, Start: 1, MountNS: node},
		{Pid: 2, Parent: 1, Start: 2, MountNS: node},           // the keeper
		{Pid: 10, Parent: 2, Start: 5, MountNS: one},           // a container's first
		{Pid: 11, Parent: 10, Start: 6, MountNS: one},          // its child
		{Pid: 12, Parent: 2, Start: 6, MountNS: one},           // executed in it
		{Pid: 13, Parent: 11, Start: 7, MountNS: own},          // has made itself a namespace
		{Pid: 14, Parent: 13, Start: 8, MountNS: 0},            // a zombie of that one
		{Pid: 20, Parent: 2, Start: 9, MountNS: two},           // another container's
		{Pid: 30, Parent: 2, Start: 99, MountNS: 14},           // has the pid of a container that has ended
		{Pid: 40, Parent: 41}, {Pid: 41, Parent: 40, Start: 1}, // nobody's, in a circle
		{Pid: 50, Parent: 2, Start: 3, MountNS: node}, // a pause process
		{Pid: 60, Parent: 2, Start: 3, MountNS: node}, // a container's first, before it has its namespace
		{Pid: 61, Parent: 60, Start: 4, MountNS: node},
	}
	o := owners{byPid: map[int]ctr.Process{}, pids: map[int]string{50: "pod"}, namespaces: map[uint64]string{}, node: node}
	for _, p := range procs {
		o.byPid[p.Pid] = p
	}
	o.add("one", 10, 5)
	o.add("two", 20, 9)
	o.add("ended", 30, 3)
	o.add("gone", 70, 3)
	o.add("young", 60, 3)
	found := map[string][]int{}
	for _, p := range procs {
		if id := o.of(p); id != "" {
			found[id] = append(found[id], p.Pid)
		}
	}
	for id, want := range map[string][]int{"one": {10, 11, 12, 13, 14}, "two": {20}, "pod": {50}, "young": {60, 61}, "ended": nil, "gone": nil} {
		if !slices.Equal(found[id], want) {
			t.Errorf("%s has %v, want %v", id, found[id], want)
		}
	}
}
