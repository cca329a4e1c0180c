package pod

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// noCheckpoint says what stands in the way, and what is left to do.
const noCheckpoint = "a rootless node cannot: to dump and to restore a container CRIU needs capabilities in the machine's first user " +
	"namespace, and its support for containers of a user namespace is not released; keep what must outlive a container in a volume, " +
	"or use a runtime that root runs"

// CheckpointContainer is not possible in a user namespace.
func (s *Service) CheckpointContainer(_ context.Context, req *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err == nil {
		err = unsupported("checkpoint container %s: %s", c.spec.ID, noCheckpoint)
	}
	return nil, grpcError(err)
}

// CheckpointPod is not possible in a user namespace.
func (s *Service) CheckpointPod(_ context.Context, req *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err == nil {
		err = unsupported("checkpoint pod %s: %s", p.spec.ID, noCheckpoint)
	}
	return nil, grpcError(err)
}

// RestorePod is not possible in a user namespace.
func (s *Service) RestorePod(context.Context, *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	return nil, grpcError(unsupported("restore pod: %s", noCheckpoint))
}
