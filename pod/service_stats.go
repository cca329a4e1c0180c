package pod

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerStats tells what a container uses; what the node does not count is left out.
func (s *Service) ContainerStats(ctx context.Context, req *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	return answer(s.containerStats(ctx, req.GetContainerId()))
}

// ListContainerStats tells what each running container uses.
func (s *Service) ListContainerStats(ctx context.Context, req *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	stats, err := s.listContainerStats(ctx, req.GetFilter())
	return answer(&runtimeapi.ListContainerStatsResponse{Stats: stats}, err)
}

// StreamContainerStats is ListContainerStats in several messages.
func (s *Service) StreamContainerStats(req *runtimeapi.StreamContainerStatsRequest, out runtimeapi.RuntimeService_StreamContainerStatsServer) error {
	stats, err := s.listContainerStats(out.Context(), req.GetFilter())
	if err != nil {
		return grpcError(err)
	}
	return stream(stats, func(chunk []*runtimeapi.ContainerStats) error {
		return out.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: chunk})
	})
}

// PodSandboxStats tells what a pod uses, and each of its running containers.
func (s *Service) PodSandboxStats(ctx context.Context, req *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	return answer(s.podStats(ctx, req.GetPodSandboxId()))
}

// ListPodSandboxStats tells what each ready pod uses.
func (s *Service) ListPodSandboxStats(ctx context.Context, req *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	stats, err := s.listPodStats(ctx, req.GetFilter())
	return answer(&runtimeapi.ListPodSandboxStatsResponse{Stats: stats}, err)
}

// StreamPodSandboxStats is ListPodSandboxStats in several messages.
func (s *Service) StreamPodSandboxStats(req *runtimeapi.StreamPodSandboxStatsRequest, out runtimeapi.RuntimeService_StreamPodSandboxStatsServer) error {
	stats, err := s.listPodStats(out.Context(), req.GetFilter())
	if err != nil {
		return grpcError(err)
	}
	return stream(stats, func(chunk []*runtimeapi.PodSandboxStats) error {
		return out.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: chunk})
	})
}

// ListMetricDescriptors describes all that ListPodSandboxMetrics may tell. It never changes.
func (s *Service) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return &runtimeapi.ListMetricDescriptorsResponse{Descriptors: descriptors()}, nil
}

// ListPodSandboxMetrics tells the metrics of each ready pod and of its running containers.
func (s *Service) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	metrics, err := s.listPodMetrics(ctx)
	return answer(&runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: metrics}, err)
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in a message for each pod: a container alone has some 20 KiB.
func (s *Service) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest, out runtimeapi.RuntimeService_StreamPodSandboxMetricsServer) error {
	metrics, err := s.listPodMetrics(out.Context())
	if err != nil {
		return grpcError(err)
	}
	for _, m := range metrics {
		if err := out.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: []*runtimeapi.PodSandboxMetrics{m}}); err != nil {
			return err
		}
	}
	return nil
}
