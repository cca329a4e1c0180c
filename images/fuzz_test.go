package images

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/images/protofuzz"
)

// fuzzDeadline is the caller's; fuzzPatience is how long the call may take to notice.
const (
	fuzzDeadline = 2 * time.Second
	fuzzPatience = 20 * time.Second
)

// fuzzImage stands in a request for an image that the registry has.
const fuzzImage = "IMAGE"

// request is a pointer to a request type.
type request[T any] interface {
	*T
	proto.Message
}

// fuzzRPC feeds requests to one RPC of a service whose only way out is a registry on loopback: the namespaces of the
// test have no other network. It fails where the server panics or says Internal, where the call does not come back,
// and where the store is not as its own check wants it.
func fuzzRPC[T any, P request[T]](f *testing.F, call func(*Service, context.Context, P) error, seeds ...P) {
	f.Helper()
	seeds = append(seeds, P(new(T)))
	for i := range seeds {
		f.Add(uint8(i), []byte(nil))
	}
	h, s := newHub(f), openStore(f, Config{})
	h.push(f, "app:1", imageWith(f, v1.Config{User: "1002:5"}, gzipLayer(f, file("a", "x"))))
	ref, service := h.host+"/app:1", NewService(s, "known")
	f.Fuzz(func(t *testing.T, seed uint8, script []byte) {
		req := proto.CloneOf(seeds[int(seed)%len(seeds)])
		protofuzz.Edit(req.ProtoReflect(), script)
		named(req, ref)
		if _, err := s.Get(ref); errors.Is(err, ErrNotFound) {
			pull(t, s, ref)
		}
		settle(s)
		ctx, cancel := context.WithTimeout(context.Background(), fuzzDeadline)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- call(service, ctx, req) }()
		select {
		case err := <-done:
			if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
				t.Errorf("%v: for %v", err, req)
			}
		case <-time.After(fuzzPatience):
			t.Fatalf("the call does not come back: %v", req)
		}
		settle(s)
		checkStore(t, s)
	})
}

// settle waits for the background to have written out what came in: it may do so at any time, and has a file in tmp
// meanwhile.
func settle(s *Store) {
	for end := time.Now().Add(fuzzPatience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		entries, err := os.ReadDir(s.path("tmp"))
		if err == nil && len(entries) == 0 && len(s.index.unsynced()) == 0 {
			return
		}
	}
}

// named puts the reference of the image that there is in the place of the word for it.
func named(req proto.Message, ref string) {
	var spec *runtimeapi.ImageSpec
	switch r := req.(type) {
	case interface{ GetImage() *runtimeapi.ImageSpec }:
		spec = r.GetImage()
	case interface {
		GetFilter() *runtimeapi.ImageFilter
	}:
		spec = r.GetFilter().GetImage()
	}
	if spec.GetImage() == fuzzImage {
		spec.Image = ref
	}
}

func fuzzUnary[T, R any, P request[T]](f *testing.F, method func(*Service, context.Context, P) (*R, error), seeds ...P) {
	f.Helper()
	fuzzRPC(f, func(s *Service, ctx context.Context, req P) error {
		_, err := method(s, ctx, req)
		return err
	}, seeds...)
}

// sink takes what a method streams.
type sink struct {
	grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]
	ctx context.Context
}

func (s sink) Context() context.Context                    { return s.ctx }
func (s sink) Send(*runtimeapi.StreamImagesResponse) error { return nil }

// One target for each request type of ImageService. To run one: make fuzz RUN=FuzzPullImage.

func FuzzListImages(f *testing.F) {
	fuzzUnary(f, (*Service).ListImages, &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: spec(fuzzImage)}})
}

func FuzzStreamImages(f *testing.F) {
	fuzzRPC(f, func(s *Service, ctx context.Context, req *runtimeapi.StreamImagesRequest) error {
		return s.StreamImages(req, sink{ctx: ctx})
	},
		&runtimeapi.StreamImagesRequest{Filter: &runtimeapi.ImageFilter{Image: spec(fuzzImage)}})
}

func FuzzImageStatus(f *testing.F) {
	fuzzUnary(f, (*Service).ImageStatus, &runtimeapi.ImageStatusRequest{Image: spec(fuzzImage), Verbose: true})
}

func FuzzPullImage(f *testing.F) {
	fuzzUnary(f, (*Service).PullImage, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: fuzzImage, RuntimeHandler: "known",
		Annotations: map[string]string{"a": "b"}, UserSpecifiedImage: "app"},
		Auth: &runtimeapi.AuthConfig{Username: "u", Password: "p", Auth: "dTpw", ServerAddress: "http://x", IdentityToken: "i", RegistryToken: "r"},
	}, &runtimeapi.PullImageRequest{Image: spec(fuzzImage)})
}

func FuzzRemoveImage(f *testing.F) {
	fuzzUnary(f, (*Service).RemoveImage, &runtimeapi.RemoveImageRequest{Image: spec(fuzzImage)})
}

func FuzzImageFsInfo(f *testing.F) { fuzzUnary(f, (*Service).ImageFsInfo) }
