package main

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// rounds is how often each list is asked for.
const rounds = 50

// listRows are the calls that a kubelet makes again and again, with all pods running.
var listRows = []string{"ListPodSandbox", "ListContainers", "ListContainerStats", "ListPodSandboxStats", "ListPodSandboxMetrics"}

// standing times the lists while count pods of one container run.
func (b *bench) standing(ctx context.Context, count int) error {
	for i := range count {
		pod, container, err := b.launch(ctx, i)
		if pod != "" {
			defer b.remove(ctx, pod)
		}
		if err != nil {
			return fmt.Errorf("pod %d (container %s): %w", i+1, container, err)
		}
	}
	for i := -1; i < rounds; i++ {
		if i == 0 {
			clear(b.times)
		}
		for _, row := range listRows {
			began := time.Now()
			if err := b.list(ctx, row, count); err != nil {
				return fmt.Errorf("%s: %w", row, err)
			}
			b.took(row, began)
		}
	}
	return nil
}

func (b *bench) remove(ctx context.Context, pod string) {
	if _, err := b.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		fmt.Println("bench: left behind:", err)
	}
}

// list asks for one list, which must have count entries.
func (b *bench) list(ctx context.Context, row string, count int) (err error) {
	var got int
	switch row {
	case "ListPodSandbox":
		var r *runtimeapi.ListPodSandboxResponse
		r, err = b.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		got = len(r.GetItems())
	case "ListContainers":
		var r *runtimeapi.ListContainersResponse
		r, err = b.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		got = len(r.GetContainers())
	case "ListContainerStats":
		var r *runtimeapi.ListContainerStatsResponse
		r, err = b.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
		got = len(r.GetStats())
	case "ListPodSandboxStats":
		var r *runtimeapi.ListPodSandboxStatsResponse
		r, err = b.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
		got = len(r.GetStats())
	case "ListPodSandboxMetrics":
		var r *runtimeapi.ListPodSandboxMetricsResponse
		r, err = b.runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
		got = len(r.GetPodMetrics())
	}
	if err == nil && got != count {
		err = fmt.Errorf("it has %d entries, of %d pods", got, count)
	}
	return err
}
