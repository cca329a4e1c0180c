package pod

import (
	"cmp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// listPods returns the pods that pass every part of the filter, oldest first.
func (s *Service) listPods(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	var out []*runtimeapi.PodSandbox
	for _, p := range s.sortedPods() {
		state := p.status.snapshot().state()
		if !strings.HasPrefix(p.spec.ID, f.GetId()) ||
			f.GetState() != nil && f.GetState().GetState() != state ||
			!hasLabels(p.spec.Config.GetLabels(), f.GetLabelSelector()) {
			continue
		}
		out = append(out, &runtimeapi.PodSandbox{
			Id: p.spec.ID, Metadata: p.spec.Config.GetMetadata(), State: state,
			CreatedAt: p.spec.CreatedAt.UnixNano(), Labels: p.spec.Config.GetLabels(),
			Annotations: p.spec.Config.GetAnnotations(), RuntimeHandler: p.spec.Handler,
		})
	}
	return out
}

func (s *Service) sortedPods() []*pod {
	all := s.index.allPods()
	slices.SortFunc(all, func(a, b *pod) int {
		return cmp.Or(a.spec.CreatedAt.Compare(b.spec.CreatedAt), cmp.Compare(a.spec.ID, b.spec.ID))
	})
	return all
}

// listContainers returns the containers that pass every part of the filter, oldest first.
func (s *Service) listContainers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	var out []*runtimeapi.Container
	for _, c := range s.sortedContainers("") {
		state := c.status.snapshot().state()
		if !strings.HasPrefix(c.spec.ID, f.GetId()) ||
			!strings.HasPrefix(c.spec.PodID, f.GetPodSandboxId()) ||
			f.GetState() != nil && f.GetState().GetState() != state ||
			!hasLabels(c.spec.Config.GetLabels(), f.GetLabelSelector()) {
			continue
		}
		out = append(out, &runtimeapi.Container{
			Id: c.spec.ID, PodSandboxId: c.spec.PodID, Metadata: c.spec.Config.GetMetadata(),
			Image: c.spec.Config.GetImage(), ImageRef: c.spec.ImageRef, ImageId: c.spec.ImageID, State: state,
			CreatedAt: c.spec.CreatedAt.UnixNano(), Labels: c.spec.Config.GetLabels(),
			Annotations: c.spec.Config.GetAnnotations(),
		})
	}
	return out
}

func (s *Service) sortedContainers(podID string) []*container {
	all := s.index.allContainers(podID)
	slices.SortFunc(all, func(a, b *container) int {
		return cmp.Or(a.spec.CreatedAt.Compare(b.spec.CreatedAt), cmp.Compare(a.spec.ID, b.spec.ID))
	})
	return all
}

func hasLabels(labels, want map[string]string) bool {
	for key, value := range want {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// streamChunk is the size, in bytes, from which on a message of a stream is sent: far below gRPC's limit of 4 MiB.
// Annotations alone may be 256 KiB an item.
const streamChunk = 1 << 20

// stream sends items in lists of at least one.
func stream[T proto.Message](items []T, send func([]T) error) error {
	var chunk []T
	size := 0
	for i, item := range items {
		chunk = append(chunk, item)
		if size += proto.Size(item); size < streamChunk && i < len(items)-1 {
			continue
		}
		if err := send(chunk); err != nil {
			return err
		}
		chunk, size = nil, 0
	}
	return nil
}
