package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/pod/streaming"
)

// Config is what the program decides before the service starts.
type Config struct {
	RuntimeDir string // statuses, namespaces, files of pods; on a filesystem that may vanish with the node
	DataDir    string // specs, kept over restarts of the node
	Version    string // of the program, semver
	StreamAddr string // host:port of the streaming server; port 0 takes a free one
	Host       ctr.Host
	Handlers   map[string]Handler // runtime handlers beside the default one, by name
	Policy     string             // what happens to limits that cannot be applied; shown in Status
	Conditions []Condition        // what the host lacks, shown in Status
	SysInfo    map[string]string  // shown in Status when verbose
	Log        *slog.Logger
}

// Condition is a fact about the node for Status. Status false says that something is missing.
type Condition struct {
	Type    string
	Status  bool
	Reason  string // CamelCase
	Message string // for people: what is missing, and what to do
}

// Service is the CRI RuntimeService.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer

	cfg      Config
	deps     Deps
	store    *store
	index    *index
	events   *eventLog
	handlers handlers
	boot     atomic.Pointer[string] // the keeper's boot id
	streams  *streaming.Server

	stop context.CancelFunc
	wg   sync.WaitGroup // the watcher, and the history's writer
}

// Open takes over what the disk and the keeper know, and starts to serve streams. Pods of a daemon that died go
// on; pods of a node that died are NotReady.
func Open(ctx context.Context, cfg Config, deps Deps) (*Service, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	store, err := openStore(cfg.DataDir, cfg.RuntimeDir, cfg.Log)
	if err != nil {
		return nil, err
	}
	if err := ctr.EnsurePause(pauseDir(cfg)); err != nil {
		return nil, fmt.Errorf("make pause root: %w", err)
	}
	s := &Service{cfg: cfg, deps: deps, store: store, index: newIndex(), events: newEventLog(), handlers: handlers{byName: maps.Clone(cfg.Handlers)}}
	seq, err := s.recoverAll(ctx)
	if err != nil {
		return nil, fmt.Errorf("recover pods: %w", err)
	}
	if s.streams, err = openStreams(s, cfg.StreamAddr); err != nil {
		return nil, err
	}
	watchCtx, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.wg.Go(func() { s.watch(watchCtx, seq) })
	s.wg.Go(func() { s.store.history.run(watchCtx) })
	return s, nil
}

// Close ends the streams and every goroutine of the service, and brings the history to stable storage. Pods go on.
func (s *Service) Close() error {
	s.stop()
	err := s.streams.Close()
	s.wg.Wait()
	return errors.Join(err, s.store.history.close())
}

func (s *Service) bootID() string { return *s.boot.Load() }

// RunPodSandbox makes a pod that is ready, or leaves nothing.
func (s *Service) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	id, err := s.runPod(ctx, req)
	return answer(&runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, err)
}

// StopPodSandbox kills what runs in a pod and gives its address and ports back. Idempotent; an unknown id is no error.
func (s *Service) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	return answer(&runtimeapi.StopPodSandboxResponse{}, s.stopPod(ctx, req.GetPodSandboxId()))
}

// RemovePodSandbox stops a pod and removes it with its containers. Idempotent; an unknown id is no error.
func (s *Service) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	return answer(&runtimeapi.RemovePodSandboxResponse{}, s.removePod(ctx, req.GetPodSandboxId()))
}

// PodSandboxStatus tells of one pod; verbose adds its pid, namespaces and configuration.
func (s *Service) PodSandboxStatus(_ context.Context, req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	return answer(s.podStatus(req))
}

// ListPodSandbox lists the pods that pass the filter.
func (s *Service) ListPodSandbox(_ context.Context, req *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.listPods(req.GetFilter())}, nil
}

// StreamPodSandboxes is ListPodSandbox in several messages.
func (s *Service) StreamPodSandboxes(req *runtimeapi.StreamPodSandboxesRequest, out runtimeapi.RuntimeService_StreamPodSandboxesServer) error {
	return stream(s.listPods(req.GetFilter()), func(chunk []*runtimeapi.PodSandbox) error {
		return out.Send(&runtimeapi.StreamPodSandboxesResponse{PodSandboxes: chunk})
	})
}

// CreateContainer records a container in a pod that is ready. No process runs yet.
func (s *Service) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	id, err := s.createContainer(ctx, req)
	return answer(&runtimeapi.CreateContainerResponse{ContainerId: id}, err)
}

// StartContainer runs the program of a created container.
func (s *Service) StartContainer(ctx context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	return answer(&runtimeapi.StartContainerResponse{}, s.startContainer(ctx, req.GetContainerId()))
}

// StopContainer sends the container's stop signal, and SIGKILL after the timeout. Idempotent.
func (s *Service) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	grace := seconds(req.GetTimeout())
	return answer(&runtimeapi.StopContainerResponse{}, s.stopContainer(ctx, req.GetContainerId(), grace))
}

// RemoveContainer removes a container, by force where it runs. Idempotent; an unknown id is no error.
func (s *Service) RemoveContainer(ctx context.Context, req *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	return answer(&runtimeapi.RemoveContainerResponse{}, s.removeContainer(ctx, req.GetContainerId()))
}

// ListContainers lists the containers that pass the filter.
func (s *Service) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.listContainers(req.GetFilter())}, nil
}

// StreamContainers is ListContainers in several messages.
func (s *Service) StreamContainers(req *runtimeapi.StreamContainersRequest, out runtimeapi.RuntimeService_StreamContainersServer) error {
	return stream(s.listContainers(req.GetFilter()), func(chunk []*runtimeapi.Container) error {
		return out.Send(&runtimeapi.StreamContainersResponse{Containers: chunk})
	})
}

// ContainerStatus tells of one container; verbose adds its pid and OCI spec.
func (s *Service) ContainerStatus(_ context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	return answer(s.containerStatus(req))
}

// UpdateContainerResources puts other limits on a container that was created or runs, all of them or none.
func (s *Service) UpdateContainerResources(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	return answer(&runtimeapi.UpdateContainerResourcesResponse{}, s.updateContainer(ctx, req))
}

// UpdatePodSandboxResources records what a pod is to have in all.
func (s *Service) UpdatePodSandboxResources(ctx context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return answer(&runtimeapi.UpdatePodSandboxResourcesResponse{}, s.updatePod(ctx, req))
}

// ReopenContainerLog makes a running container log to a new file, after the old one was renamed.
func (s *Service) ReopenContainerLog(ctx context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	return answer(&runtimeapi.ReopenContainerLogResponse{}, s.reopenLog(ctx, req.GetContainerId()))
}

// ExecSync runs a command in a container and returns its output, the first 16 MiB of each stream.
func (s *Service) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	return answer(s.execSync(ctx, req))
}

// Exec returns a URL, good for one use, at which a command is run with streams.
func (s *Service) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	return answer(s.execURL(req))
}

// Attach returns a URL, good for one use, at which a container's own streams are joined.
func (s *Service) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return answer(s.attachURL(req))
}

// PortForward returns a URL, good for one use, at which ports on a pod's loopback are reached.
func (s *Service) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	return answer(s.portForwardURL(req))
}

// seconds converts a CRI timeout without overflow; what is negative is none.
func seconds(n int64) time.Duration {
	const most = int64(1<<63-1) / int64(time.Second)
	return time.Duration(min(max(n, 0), most)) * time.Second
}
