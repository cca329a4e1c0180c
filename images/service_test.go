package images

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// dialService serves s on a socket, as crictl would find it.
func dialService(t *testing.T, s *Store) runtimeapi.ImageServiceClient {
	t.Helper()
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterImageServiceServer(server, NewService(s, "known"))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return runtimeapi.NewImageServiceClient(conn)
}

func spec(name string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: name} }

func TestService(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	c, ctx := dialService(t, s), context.Background()
	id := h.push(t, "app:1", imageWith(t, v1.Config{User: "1002:5"}, gzipLayer(t, file("a", strings.Repeat("x", 10_000)), entry{name: "dev", kind: tar.TypeChar})))
	named := h.push(t, "named:1", imageWith(t, v1.Config{User: "www-data"}, gzipLayer(t, file("b", "y"))))

	status1, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec(h.host + "/app:1")})
	if err != nil || status1.Image != nil {
		t.Errorf("status of an absent image: %v, %v", status1, err)
	}
	for ref, want := range map[string]string{"/app:1": id, "/named:1": named} {
		resp, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec(h.host + ref)})
		if err != nil || resp.ImageRef != want {
			t.Fatalf("pull %s: %v, %v", ref, resp, err)
		}
	}
	st, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec(id), Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if st.Image.Id != id || st.Image.Uid.GetValue() != 1002 || st.Image.Username != "" || st.Image.Size < 10_000 || st.Image.Pinned {
		t.Errorf("%v", st.Image)
	}
	var info struct {
		ImageSpec v1.ConfigFile
		Layers    []struct{ LeftOut []note }
	}
	if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil || info.ImageSpec.Config.User != "1002:5" || len(info.Layers) != 1 || len(info.Layers[0].LeftOut) != 1 {
		t.Errorf("info %s: %v", st.Info["info"], err)
	}
	st, err = c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec(idHex(named)[:10])})
	if err != nil || st.Image.GetUsername() != "www-data" || st.Image.Uid != nil || len(st.Info) != 0 {
		t.Errorf("%v, %v", st, err)
	}
	testFsInfo(t, c, s, id)
	testList(t, c, h, id)
	for range 2 {
		if _, err := c.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec(h.host + "/app:1")}); err != nil {
			t.Error(err)
		}
	}
	if list, err := c.ListImages(ctx, &runtimeapi.ListImagesRequest{}); err != nil || len(list.Images) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}

func testFsInfo(t *testing.T, c runtimeapi.ImageServiceClient, s *Store, id string) {
	t.Helper()
	mount(t, s, "c", id)
	measured(t, s, "c")
	fs, err := c.ImageFsInfo(context.Background(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(fs.ImageFilesystems) != 1 || len(fs.ContainerFilesystems) != 1 {
		t.Fatalf("%v, %v", fs, err)
	}
	u := fs.ImageFilesystems[0]
	if u.FsId.Mountpoint != s.Root() || !exists(u.FsId.Mountpoint) || u.UsedBytes.Value < 10_000 || u.InodesUsed.Value < 4 || u.Timestamp <= 0 {
		t.Errorf("%v", u)
	}
	if u := fs.ContainerFilesystems[0]; u.InodesUsed.Value != 1 || u.Timestamp <= 0 {
		t.Errorf("%v", u)
	}
}

func testList(t *testing.T, c runtimeapi.ImageServiceClient, h *hub, id string) {
	t.Helper()
	ctx := context.Background()
	for filter, want := range map[string]int{"": 2, h.host + "/app:1": 1, id: 1, "nothing": 0} {
		req := &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: spec(filter)}}
		list, err := c.ListImages(ctx, req)
		if err != nil || len(list.Images) != want {
			t.Errorf("list %q: %v, %v", filter, list, err)
		}
	}
	stream, err := c.StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Images) == 0 {
			t.Error("an empty message")
		}
		for _, img := range resp.Images {
			ids = append(ids, img.Id)
		}
	}
	if len(ids) != 2 || !slices.Contains(ids, id) {
		t.Errorf("streamed %v", ids)
	}
}

// received keeps what a method streams.
type received struct {
	sink
	messages [][]*runtimeapi.Image
}

func (r *received) Send(resp *runtimeapi.StreamImagesResponse) error {
	r.messages = append(r.messages, resp.GetImages())
	return nil
}

// Annotations of an image are whatever its manifest says: few images may be more than a message can hold.
func TestStreamImagesCutsBySize(t *testing.T) {
	s := &Store{index: newIndex()}
	sizes := map[string]int{"a": 400_000, "b": 400_000, "c": 400_000, "d": 2 << 20, "e": 10, "f": 10}
	for id, size := range sizes {
		s.index.images["sha256:"+id] = &imageRecord{ID: "sha256:" + id, file: &v1.ConfigFile{}, Annotations: map[string]string{"a": strings.Repeat("x", size)}}
	}
	all, err := NewService(s).list(nil)
	if err != nil || len(all) != len(sizes) {
		t.Fatalf("%d images, %v", len(all), err)
	}
	var got received
	if err := NewService(s).StreamImages(&runtimeapi.StreamImagesRequest{}, &got); err != nil {
		t.Fatal(err)
	}
	var told []*runtimeapi.Image
	for i, images := range got.messages {
		told = append(told, images...)
		if size := proto.Size(&runtimeapi.StreamImagesResponse{Images: images}); len(images) == 0 || len(images) > 1 && size > streamBytes+1000 {
			t.Errorf("message %d has %d images and %d bytes", i, len(images), size)
		}
	}
	if !slices.EqualFunc(told, all, func(a, b *runtimeapi.Image) bool { return proto.Equal(a, b) }) {
		t.Errorf("told %d images, want %d in the same order", len(told), len(all))
	}
	if n := len(got.messages); n < 3 || n >= len(all) { // 3.2 MB, of which 2 are one image
		t.Errorf("%d messages for %d images", n, len(all))
	}
}

func TestServiceErrors(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	c, ctx := dialService(t, s), context.Background()
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", ""))))
	handler := spec(h.host + "/app:1")
	handler.RuntimeHandler = "unknown"
	for what, c := range map[string]struct {
		err  func() error
		code codes.Code
		text string
	}{
		"missing image": {func() error {
			_, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec(h.host + "/none:1")})
			return err
		}, codes.NotFound, h.host + "/none:1"},
		"bad reference": {func() error { _, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec("a b")}); return err }, codes.InvalidArgument, "a b"},
		"no reference":  {func() error { _, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{}); return err }, codes.InvalidArgument, "empty"},
		"dead registry": {func() error {
			_, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec("127.0.0.1:1/app:1")})
			return err
		}, codes.Unavailable, "RegistryUnavailable"},
		"unknown handler": {func() error { _, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: handler}); return err }, codes.InvalidArgument, `"unknown"`},
	} {
		err := c.err()
		if status.Code(err) != c.code || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v, want %v", what, err, c.code)
		}
	}
	handler.RuntimeHandler = "known"
	if _, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: handler}); err != nil {
		t.Error(err)
	}
}
