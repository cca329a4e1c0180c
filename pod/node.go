package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	kubeAPIVersion = "0.1.0" // the kubelet refuses any other
	runtimeName    = "coracle"
	criVersion     = "v1"
)

// keeperPatience bounds the question whether the keeper answers.
const keeperPatience = 2 * time.Second

// Version names the program and the API.
func (s *Service) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: kubeAPIVersion, RuntimeName: runtimeName,
		RuntimeVersion: s.cfg.Version, RuntimeApiVersion: criVersion,
	}, nil
}

// Status asks, rather than remembers: a condition is true only while it is.
func (s *Service) Status(ctx context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	askCtx, cancel := context.WithTimeout(ctx, keeperPatience)
	defer cancel()
	keeper, keeperErr := s.deps.Containers.Info(askCtx)
	conditions := []*runtimeapi.RuntimeCondition{
		condition(runtimeapi.RuntimeReady, "KeeperUnreachable", keeperErr),
		condition(runtimeapi.NetworkReady, "NetworkNotReady", s.deps.Network.Ready()),
	}
	for _, c := range s.cfg.Conditions {
		conditions = append(conditions, &runtimeapi.RuntimeCondition{
			Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message,
		})
	}
	out := &runtimeapi.StatusResponse{
		Status:          &runtimeapi.RuntimeStatus{Conditions: conditions},
		RuntimeHandlers: s.runtimeHandlers(),
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	if !req.GetVerbose() {
		return out, nil
	}
	config, err := json.Marshal(map[string]any{
		"version": s.cfg.Version, "policy": s.cfg.Policy, "runtimeDir": s.cfg.RuntimeDir, "dataDir": s.cfg.DataDir,
		"streamAddress": s.streams.Addr(), "handlers": s.handlers.all(), "keeper": keeper, "goroutines": runtime.NumGoroutine(),
		"system": s.cfg.SysInfo, "network": s.deps.Network.Info(),
	})
	if err != nil {
		return nil, grpcError(fmt.Errorf("encode verbose info: %w", err))
	}
	out.Info = map[string]string{"config": string(config)}
	return out, nil
}

func condition(kind, reason string, err error) *runtimeapi.RuntimeCondition {
	c := &runtimeapi.RuntimeCondition{Type: kind, Status: err == nil}
	if err != nil {
		c.Reason, c.Message = reason, err.Error()
	}
	return c
}

// RuntimeConfig names the cgroup driver. It is cgroupfs whatever the host runs: the delegated subtree is ours,
// and no systemd is asked to make anything in it.
func (s *Service) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{
		Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS},
	}, nil
}

// UpdateRuntimeConfig sets the range of later pods. "If the CIDR is empty, runtimes should omit it." Pods that run keep their address.
func (s *Service) UpdateRuntimeConfig(_ context.Context, req *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	return answer(&runtimeapi.UpdateRuntimeConfigResponse{}, s.deps.Network.SetPodCIDR(cidr))
}
