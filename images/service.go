package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// streamBytes is what the images of one message of StreamImages may take together, of the 4 MiB that gRPC lets a client
// take where it says nothing.
const streamBytes = 1 << 20

// Service is the CRI's ImageService over a Store.
type Service struct {
	runtimeapi.UnsafeImageServiceServer
	store    *Store
	handlers []string
}

var _ runtimeapi.ImageServiceServer = (*Service)(nil)

// NewService makes the service. handlers are the names of the runtime handlers that there are beside the default
// one, "": the CRI wants a pull for any other to be rejected. Images are the same for all of them.
func NewService(store *Store, handlers ...string) *Service {
	return &Service{store: store, handlers: handlers}
}

// ListImages returns the images, or the one that the filter names.
func (s *Service) ListImages(_ context.Context, req *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	images, err := s.list(req.GetFilter())
	if err != nil {
		return nil, grpcError(err)
	}
	return &runtimeapi.ListImagesResponse{Images: images}, nil
}

// StreamImages is ListImages in several messages.
func (s *Service) StreamImages(req *runtimeapi.StreamImagesRequest, stream grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	images, err := s.list(req.GetFilter())
	if err != nil {
		return grpcError(err)
	}
	for len(images) > 0 {
		n := batch(images)
		if err := stream.Send(&runtimeapi.StreamImagesResponse{Images: images[:n]}); err != nil {
			return err
		}
		images = images[n:]
	}
	return nil
}

// batch is how many of the images go into one message: at least one, whatever it takes.
func batch(images []*runtimeapi.Image) int {
	size := 0
	for i, image := range images {
		if size += proto.Size(image); size > streamBytes && i > 0 {
			return i
		}
	}
	return len(images)
}

func (s *Service) list(filter *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	name := filter.GetImage().GetImage()
	if name == "" {
		var out []*runtimeapi.Image
		for _, r := range s.store.index.list() {
			out = append(out, r.proto())
		}
		return out, nil
	}
	r, err := s.store.index.find(name)
	if isAbsent(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return []*runtimeapi.Image{r.proto()}, nil
}

// ImageStatus answers without an image, and without an error, where there is none.
func (s *Service) ImageStatus(_ context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	r, err := s.store.index.find(req.GetImage().GetImage())
	if isAbsent(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	} else if err != nil {
		return nil, grpcError(err)
	}
	resp := &runtimeapi.ImageStatusResponse{Image: r.proto()}
	if req.GetVerbose() {
		if resp.Info, err = s.store.verbose(r); err != nil {
			return nil, grpcError(err)
		}
	}
	return resp, nil
}

// PullImage pulls an image; the answer is its id.
func (s *Service) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if h := req.GetImage().GetRuntimeHandler(); h != "" && !slices.Contains(s.handlers, h) {
		return nil, grpcError(fmt.Errorf("%w: pull image %s: runtime handler %q is not configured", ErrInvalid, req.GetImage().GetImage(), h))
	}
	var auth *Auth
	if a := req.GetAuth(); a != nil {
		auth = &Auth{Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(), IdentityToken: a.GetIdentityToken(),
			RegistryToken: a.GetRegistryToken(), ServerAddress: a.GetServerAddress()}
	}
	image, err := s.store.Pull(ctx, req.GetImage().GetImage(), auth)
	if err != nil {
		return nil, grpcError(err)
	}
	return &runtimeapi.PullImageResponse{ImageRef: image.ID}, nil
}

// RemoveImage removes an image with all of its names.
func (s *Service) RemoveImage(_ context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	if err := s.store.Remove(req.GetImage().GetImage()); err != nil {
		return nil, grpcError(err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// firstMeasure bounds how long ImageFsInfo waits for layers that nobody has measured yet: mostly new ones, with little in
// them.
const firstMeasure = 100 * time.Millisecond

// ImageFsInfo reports the store's filesystem. What images take was counted when they were unpacked; of what containers
// have written the last measures are added up, and the time told is that of the oldest. Both are on one filesystem,
// under one mount point.
func (s *Service) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	images := Usage{At: time.Now()}
	images.Bytes, images.Inodes = s.store.Usage()
	containers := Usage{At: images.At}
	first, cancel := context.WithTimeout(ctx, firstMeasure)
	defer cancel()
	for _, key := range s.store.index.mountKeys(kindRootfs) {
		u, err := s.store.RootfsUsage(first, strings.TrimPrefix(key, kindRootfs+"/"))
		if errors.Is(err, ErrClosed) || ctx.Err() != nil {
			return nil, grpcError(errors.Join(err, ctx.Err()))
		}
		if err != nil {
			continue // removed meanwhile, not measured yet, or not measurable, which the log tells
		}
		containers.Bytes, containers.Inodes = containers.Bytes+u.Bytes, containers.Inodes+u.Inodes
		if u.At.Before(containers.At) {
			containers.At = u.At
		}
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     []*runtimeapi.FilesystemUsage{s.store.fsUsage(images)},
		ContainerFilesystems: []*runtimeapi.FilesystemUsage{s.store.fsUsage(containers)},
	}, nil
}

func (s *Store) fsUsage(u Usage) *runtimeapi.FilesystemUsage {
	return &runtimeapi.FilesystemUsage{
		Timestamp:  u.At.UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.cfg.Root},
		UsedBytes:  &runtimeapi.UInt64Value{Value: u.Bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: u.Inodes},
	}
}

func (r *imageRecord) proto() *runtimeapi.Image {
	img := r.image()
	p := &runtimeapi.Image{Id: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Size: max(img.Size, 1),
		Spec: &runtimeapi.ImageSpec{Image: img.ID, Annotations: r.Annotations}}
	user, _, _ := strings.Cut(img.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		p.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		p.Username = user
	}
	return p
}

// verbose is an image's details as JSON, for people.
func (s *Store) verbose(r *imageRecord) (map[string]string, error) {
	type layerInfo struct {
		DiffID string `json:"diffID"`
		Bytes  uint64 `json:"bytes"`
		Inodes uint64 `json:"inodes"`
		Path   string `json:"path"`
		// LeftOut lists what the layer asked for and a user namespace does not give.
		LeftOut []note `json:"leftOut,omitempty"`
	}
	info := struct {
		Manifest  string          `json:"manifest"`
		Platform  string          `json:"platform"`
		Pulled    time.Time       `json:"pulled"`
		ImageSpec json.RawMessage `json:"imageSpec"`
		Layers    []layerInfo     `json:"layers"`
	}{Manifest: r.Manifest, Pulled: r.Pulled, ImageSpec: r.Config}
	if p := r.file.Platform(); p != nil {
		info.Platform = p.String()
	}
	for _, d := range r.Layers {
		l := layerInfo{DiffID: d, Path: s.layerDir(d)}
		if rec := s.index.layer(d); rec != nil {
			l.Bytes, l.Inodes, l.LeftOut = rec.Bytes, rec.Inodes, rec.Notes
		}
		info.Layers = append(info.Layers, l)
	}
	raw, err := json.Marshal(info)
	if err != nil {
		return nil, fmt.Errorf("describe image %s: %w", r.ID, err)
	}
	return map[string]string{"info": string(raw)}, nil
}
