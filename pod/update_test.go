package pod

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (h *harness) update(id string, r *runtimeapi.LinuxContainerResources) error {
	_, err := h.UpdateContainerResources(h.ctx(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
	return err
}

func (h *harness) allControllers() {
	h.cfg.Host.Controllers = map[string]bool{"cpu": true, "memory": true, "cpuset": true, "pids": true, "hugetlb": true}
	h.restart(nil)
}

func TestUpdateContainer(t *testing.T) {
	h := newHarness(t)
	h.allControllers()
	pod := h.run(h.podConfig("p"))
	config := shell("c", "sleep 100")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20,
		Unified: map[string]string{"pids.max": "10"}}
	id := h.create(pod, config)
	if err := h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 2048, OomScoreAdj: 900}); err != nil {
		t.Fatal(err)
	}
	// It starts with what the update said, and with what the update left as it was.
	h.start(id)
	proc, err := h.keeper.proc(id)
	if err != nil {
		t.Fatal(err)
	}
	spec := proc.req.Spec
	if r := spec.Linux.Resources; *r.CPU.Shares != 2048 || *r.Memory.Limit != 64<<20 || r.Unified["pids.max"] != "10" || *spec.Process.OOMScoreAdj != 900 {
		t.Errorf("started with %+v, %v", r, *spec.Process.OOMScoreAdj)
	}
	if err := h.update(id, &runtimeapi.LinuxContainerResources{CpuQuota: 20000, CpuPeriod: 100000, MemoryLimitInBytes: 128 << 20,
		OomScoreAdj: 950, Unified: map[string]string{"pids.max": "20"}}); err != nil {
		t.Fatal(err)
	}
	last := proc.limits[len(proc.limits)-1]
	if *last.CPU.Quota != 20000 || *last.CPU.Shares != 2048 || *last.Memory.Limit != 128<<20 || last.Unified["pids.max"] != "20" {
		t.Errorf("the keeper was told %+v", last)
	}
	check := func() {
		t.Helper()
		st := h.status(id)
		if r := st.Resources.Linux; r.CpuQuota != 20000 || r.CpuShares != 2048 || r.MemoryLimitInBytes != 128<<20 || r.OomScoreAdj != 900 || r.Unified["pids.max"] != "20" {
			t.Errorf("in force: %v", r)
		}
		if !strings.Contains(st.Message, "oom_score_adj stays 900") {
			t.Errorf("message %q", st.Message)
		}
	}
	check()
	h.restart(nil)
	check()

	// All or nothing.
	h.keeper.setFailure("update", errors.New("the kernel says no"))
	if err := h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 2}); err == nil {
		t.Error("a refused update is no error")
	}
	h.keeper.setFailure("update", nil)
	check()
	for _, bad := range []*runtimeapi.LinuxContainerResources{
		nil, {CpuShares: -1}, {MemoryLimitInBytes: -5}, {OomScoreAdj: 1001}, {Unified: map[string]string{"nonsense": "1"}}, {MemorySwapLimitInBytes: 1},
	} {
		wantCode(t, h.update(id, bad), codes.InvalidArgument)
	}
	check()
	wantCode(t, h.update("nobody", &runtimeapi.LinuxContainerResources{}), codes.NotFound)
	h.stop(id, 0)
	wantCode(t, h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 2}), codes.FailedPrecondition)
}

// TestUpdateThatDiskRefuses: the limits of before come back.
func TestUpdateThatDiskRefuses(t *testing.T) {
	h := newHarness(t)
	h.allControllers()
	pod := h.run(h.podConfig("p"))
	config := shell("c", "sleep 100")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512}
	id := h.create(pod, config)
	h.start(id)
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	inTheWay := c.status.path + tempSuffix
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 2048}); err == nil {
		t.Error("an update that is not on disk is no error")
	}
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	if got := h.status(id).Resources.Linux.CpuShares; got != 512 {
		t.Errorf("in force: %d", got)
	}
	proc, err := h.keeper.proc(id)
	if err != nil {
		t.Fatal(err)
	}
	if last := proc.limits[len(proc.limits)-1]; *last.CPU.Shares != 512 {
		t.Errorf("the keeper was left with %d", *last.CPU.Shares)
	}
}

// TestUpdateWithoutControllers: what cannot be enforced is told, or refused.
func TestUpdateWithoutControllers(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("c", "sleep 100")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512}
	id := h.create(pod, config)
	h.start(id)
	if err := h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 2048, MemoryLimitInBytes: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	st := h.status(id)
	if !strings.Contains(st.Message, "cpu shares 2048") || strings.Contains(st.Message, "512") || !strings.Contains(st.Message, "memory limit") {
		t.Errorf("message %q", st.Message)
	}
	if r := st.Resources.Linux; r.CpuShares != 0 || r.MemoryLimitInBytes != 0 {
		t.Errorf("what is not in force is shown: %v", r)
	}
	h.cfg.Host.Strict = true
	h.restart(nil)
	wantCode(t, h.update(id, &runtimeapi.LinuxContainerResources{CpuShares: 4096}), codes.FailedPrecondition)
}

func TestUpdatePod(t *testing.T) {
	h := newHarness(t)
	h.allControllers()
	config := h.podConfig("p")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 1000, MemoryLimitInBytes: 5 << 20}
	config.Linux.Overhead = &runtimeapi.LinuxContainerResources{CpuShares: 24}
	pod := h.run(config)
	shares := func() string {
		raw, err := os.ReadFile(filepath.Join(h.cgroups.pods()[0], "shares"))
		if err != nil {
			t.Error(err)
		}
		return string(raw)
	}
	if shares() != "1024" {
		t.Errorf("made with %s shares", shares())
	}
	update := func(id string, r *runtimeapi.LinuxContainerResources) error {
		_, err := h.UpdatePodSandboxResources(h.ctx(), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: id, Resources: r})
		return err
	}
	if err := update(pod, &runtimeapi.LinuxContainerResources{CpuShares: 2000}); err != nil {
		t.Fatal(err)
	}
	if shares() != "2024" {
		t.Errorf("updated to %s shares", shares())
	}
	wantCode(t, update(pod, &runtimeapi.LinuxContainerResources{CpuShares: -2}), codes.InvalidArgument)
	h.cgroups.set("weigh", errors.New("the kernel says no"))
	if err := update(pod, &runtimeapi.LinuxContainerResources{CpuShares: 3000}); err == nil {
		t.Error("a refused update is no error")
	}
	h.cgroups.set("weigh", nil)
	h.restart(nil)
	resp, err := h.PodSandboxStatus(h.ctx(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil || !strings.Contains(resp.Info["info"], `"cpu_shares":2000`) || !strings.Contains(resp.Info["info"], `"memory_limit_in_bytes":5242880`) {
		t.Errorf("after a restart: %v %v", resp.GetInfo(), err)
	}
	wantCode(t, update("nobody", nil), codes.NotFound)
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, update(pod, &runtimeapi.LinuxContainerResources{CpuShares: 2}), codes.FailedPrecondition)
	config = h.podConfig("q")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: -1}
	_, err = h.tryRun(config)
	wantCode(t, err, codes.InvalidArgument)
}

func TestCheckpointIsRefused(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 100")
	for _, call := range []struct {
		do   func() error
		want codes.Code
	}{
		{func() error {
			_, err := h.CheckpointContainer(h.ctx(), &runtimeapi.CheckpointContainerRequest{ContainerId: id})
			return err
		}, codes.Unimplemented},
		{func() error {
			_, err := h.CheckpointContainer(h.ctx(), &runtimeapi.CheckpointContainerRequest{ContainerId: "x"})
			return err
		}, codes.NotFound},
		{func() error {
			_, err := h.CheckpointPod(h.ctx(), &runtimeapi.CheckpointPodRequest{PodSandboxId: pod})
			return err
		}, codes.Unimplemented},
		{func() error {
			_, err := h.CheckpointPod(h.ctx(), &runtimeapi.CheckpointPodRequest{PodSandboxId: "x"})
			return err
		}, codes.NotFound},
		{func() error { _, err := h.RestorePod(h.ctx(), &runtimeapi.RestorePodRequest{}); return err }, codes.Unimplemented},
	} {
		err := call.do()
		wantCode(t, err, call.want)
		if call.want == codes.Unimplemented && !strings.Contains(err.Error(), "CRIU") {
			t.Errorf("it does not say why: %v", err)
		}
	}
}
