package pod

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestStatus(t *testing.T) {
	h := newHarness(t)
	v, err := h.Version(h.ctx(), &runtimeapi.VersionRequest{})
	if err != nil || v.Version != "0.1.0" || v.RuntimeName != "coracle" || v.RuntimeApiVersion != "v1" {
		t.Errorf("%v %v", v, err)
	}
	ask := func(verbose bool) (map[string]*runtimeapi.RuntimeCondition, *runtimeapi.StatusResponse) {
		resp, err := h.Status(h.ctx(), &runtimeapi.StatusRequest{Verbose: verbose})
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]*runtimeapi.RuntimeCondition{}
		for _, c := range resp.Status.Conditions {
			all[c.Type] = c
		}
		return all, resp
	}
	all, resp := ask(false)
	if !all["RuntimeReady"].Status || !all["NetworkReady"].Status || all["MemoryController"].Status || len(resp.Info) > 0 {
		t.Errorf("%v", resp)
	}
	h.network.set("ready", errors.New("the bridge is gone"))
	h.keeper.setFailure("info", errors.New("no keeper"))
	all, resp = ask(true)
	if all["RuntimeReady"].Status || all["NetworkReady"].Status || !strings.Contains(all["NetworkReady"].Message, "bridge") {
		t.Errorf("%v", resp)
	}
	if !strings.Contains(resp.Info["config"], `"kernel":"test"`) || !strings.Contains(resp.Info["config"], `"driver":"fake"`) {
		t.Errorf("info %v", resp.Info)
	}
	h.keeper.setFailure("info", nil)
	config, err := h.RuntimeConfig(h.ctx(), &runtimeapi.RuntimeConfigRequest{})
	if err != nil || config.Linux.CgroupDriver != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("%v %v", config, err)
	}
	for cidr, want := range map[string]codes.Code{"": codes.OK, "10.1.0.0/16": codes.OK, "nonsense": codes.InvalidArgument} {
		_, err := h.UpdateRuntimeConfig(h.ctx(), &runtimeapi.UpdateRuntimeConfigRequest{
			RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}}})
		wantCode(t, err, want)
	}
	if h.network.cidr != "10.1.0.0/16" {
		t.Errorf("cidr %q", h.network.cidr)
	}
}

func TestVerbose(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	c, err := h.ContainerStatus(h.ctx(), &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil || !strings.Contains(c.Info["info"], `"runtimeSpec":{"ociVersion"`) || !strings.Contains(c.Info["info"], `"pid":`) {
		t.Errorf("%v %v", c.GetInfo(), err)
	}
	p, err := h.PodSandboxStatus(h.ctx(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: h.listPods(nil)[0].Id, Verbose: true})
	if err != nil || !strings.Contains(p.Info["info"], "networkNamespace") || len(p.ContainersStatuses) != 1 {
		t.Errorf("%v %v", p, err)
	}
}

// TestReadsDoNotWait: an operation that hangs in a leaf holds up no reader.
func TestReadsDoNotWait(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 1000")
	p, err := h.index.pod(pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.op.lock(h.ctx()); err != nil {
		t.Fatal(err)
	}
	h.sandbox(pod)
	h.status(id)
	h.listPods(nil)
	h.listContainers(nil)
	ctx, cancel := context.WithTimeout(h.ctx(), 50*time.Millisecond)
	defer cancel()
	_, err = h.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
	wantCode(t, err, codes.DeadlineExceeded)
	p.op.unlock()
}

// TestManyAtOnce lets many callers do everything to the same few pods.
func TestManyAtOnce(t *testing.T) {
	h := newHarness(t)
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			for round := range 4 {
				h.worker(fmt.Sprintf("pod%d", worker/2), uint32(round), rand.N(3))
			}
		})
	}
	wg.Wait()
}

// worker shares its pod's name with another: one of the two gets it.
func (h *harness) worker(name string, attempt uint32, how int) {
	ctx := h.ctx()
	config := h.podConfig(name)
	config.Metadata.Attempt = attempt
	if how == 0 {
		config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	}
	pod, err := h.tryRun(config)
	if err != nil {
		wantCode(h.t, err, codes.AlreadyExists)
		return
	}
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			id, err := h.tryCreate(pod, shell(fmt.Sprintf("c%d", i), "sleep 0.05; exit 1"))
			if err != nil {
				h.t.Error(err)
				return
			}
			if _, err := h.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
				h.t.Error(err)
			}
			h.listContainers(nil)
			if i == how {
				h.exited(id)
			} else if _, err := h.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: int64(i)}); err != nil {
				h.t.Error(err)
			}
			if _, err := h.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{}); err != nil {
				h.t.Error(err)
			}
			if _, err := h.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{}); err != nil {
				h.t.Error(err)
			}
		})
	}
	wg.Wait()
	for range 2 {
		wg.Go(func() {
			if _, err := h.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
				h.t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := h.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
				h.t.Error(err)
			}
		})
	}
	wg.Wait()
}
