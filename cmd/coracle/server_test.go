package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/netslirp"
)

// behaviour is a RuntimeService that panics in one call, waits in another, and streams without end in a third.
type behaviour struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	began chan struct{}
}

func (behaviour) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	var nobody *runtimeapi.VersionResponse
	return &runtimeapi.VersionResponse{Version: nobody.Version}, nil
}

func (behaviour) Status(ctx context.Context, _ *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// ListContainers panics on another thread, as what makes or enters a pod's namespaces may.
func (behaviour) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return nil, netslirp.OnOwnThread(panicsOnAThread)
}

func panicsOnAThread() error { panic("on a thread") }

func (b behaviour) GetContainerEvents(_ *runtimeapi.GetEventsRequest, out runtimeapi.RuntimeService_GetContainerEventsServer) error {
	close(b.began)
	<-out.Context().Done()
	return context.Cause(out.Context())
}

func (behaviour) StreamContainers(*runtimeapi.StreamContainersRequest, runtimeapi.RuntimeService_StreamContainersServer) error {
	panic("in a stream")
}

func (behaviour) ExecSync(_ context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	return &runtimeapi.ExecSyncResponse{Stdout: bytes.Repeat([]byte{'x'}, 16<<20), Stderr: bytes.Repeat([]byte{'x'}, 16<<20)}, nil
}

// conditions is a RuntimeService that is ready or not.
type conditions struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	ready atomic.Bool
}

func (c *conditions) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
		{Type: runtimeapi.RuntimeReady, Status: true}, {Type: runtimeapi.NetworkReady, Status: c.ready.Load()}, {Type: "ResourceLimits"}}}}, nil
}

type noImages struct {
	runtimeapi.UnimplementedImageServiceServer
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// startServer serves on a socket of its own; end begins the daemon's end, as SIGTERM does.
func startServer(t *testing.T, c grpcConfig, runtime runtimeapi.RuntimeServiceServer) (conn *grpc.ClientConn, log *syncBuffer, end func()) {
	t.Helper()
	ctx, end := context.WithCancel(context.Background())
	log = &syncBuffer{}
	server := newServer(ctx, c, runtime, noImages{}, slog.New(slog.NewTextHandler(log, nil)))
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := listenOwn(socket, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		end()
		server.GracefulStop()
		conn.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return conn, log, end
}

func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("got %v, want code %s", err, want)
	}
}

func TestPanicsStayInTheirCall(t *testing.T) {
	conn, log, _ := startServer(t, grpcConfig{}, behaviour{began: make(chan struct{})})
	client := runtimeapi.NewRuntimeServiceClient(conn)
	_, err := client.Version(context.Background(), &runtimeapi.VersionRequest{})
	wantCode(t, err, codes.Internal)
	if !strings.Contains(log.String(), "behaviour.Version") {
		t.Errorf("the log has no stack: %s", log)
	}
	stream, err := client.StreamContainers(context.Background(), &runtimeapi.StreamContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Internal)
	if !strings.Contains(log.String(), "in a stream") {
		t.Errorf("the log does not have the reason: %s", log)
	}
	_, err = client.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{})
	wantCode(t, err, codes.Internal)
	if text := err.Error(); !strings.Contains(text, "(on a thread)") || strings.Contains(text, "goroutine") {
		t.Errorf("the client is told: %s", text)
	}
	for _, function := range []string{"panicsOnAThread", "behaviour.ListContainers"} {
		if !strings.Contains(log.String(), function) {
			t.Errorf("the log does not have the stacks of both threads, with %s: %s", function, log)
		}
	}
	// The server goes on.
	_, err = client.RunPodSandbox(context.Background(), &runtimeapi.RunPodSandboxRequest{})
	wantCode(t, err, codes.Unimplemented)
}

func TestCallsEndWithTheirDeadline(t *testing.T) {
	conn, _, _ := startServer(t, grpcConfig{}, behaviour{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := runtimeapi.NewRuntimeServiceClient(conn).Status(ctx, &runtimeapi.StatusRequest{})
	wantCode(t, err, codes.DeadlineExceeded)
	// GracefulStop, in the clean-up, waits for the handler: it returns only if the deadline has reached that.
}

func TestStreamsEndWithTheDaemon(t *testing.T) {
	b := behaviour{began: make(chan struct{})}
	conn, _, end := startServer(t, grpcConfig{}, b)
	stream, err := runtimeapi.NewRuntimeServiceClient(conn).GetContainerEvents(context.Background(), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	<-b.began
	end()
	_, err = stream.Recv()
	wantCode(t, err, codes.Unavailable)
}

func TestMessagesAreBounded(t *testing.T) {
	conn, _, _ := startServer(t, grpcConfig{}, behaviour{})
	client := runtimeapi.NewRuntimeServiceClient(conn)
	resp, err := client.ExecSync(context.Background(), &runtimeapi.ExecSyncRequest{})
	if err != nil || len(resp.Stdout) != 16<<20 || len(resp.Stderr) != 16<<20 {
		t.Errorf("two full streams: %v", err)
	}
	_, err = client.ExecSync(context.Background(), &runtimeapi.ExecSyncRequest{Cmd: []string{strings.Repeat("x", maxRequest+1)}})
	wantCode(t, err, codes.ResourceExhausted)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "large", strings.Repeat("x", 2*maxHeaders))
	if _, err := client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{}); err == nil {
		t.Error("metadata without bound is taken")
	}
}

// TestExtraServices: reflection and health are there where the configuration names them.
func TestExtraServices(t *testing.T) {
	ask := func(conn *grpc.ClientConn) (health, reflect error) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		_, health = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			return health, err
		}
		err = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{
			FileContainingSymbol: "runtime.v1.RuntimeService"}})
		if err != nil && !errors.Is(err, io.EOF) { // io.EOF: the answer says why
			return health, err
		}
		answer, err := stream.Recv()
		if err == nil && len(answer.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
			t.Errorf("reflection does not know the CRI: %v", answer)
		}
		return health, err
	}
	conn, _, _ := startServer(t, grpcConfig{}, behaviour{})
	health, reflect := ask(conn)
	wantCode(t, health, codes.Unimplemented)
	wantCode(t, reflect, codes.Unimplemented)
	node := &conditions{}
	conn, _, _ = startServer(t, grpcConfig{Reflection: true, Health: true}, node)
	if health, reflect := ask(conn); health != nil || reflect != nil {
		t.Errorf("health %v, reflection %v", health, reflect)
	}
	for _, tc := range []struct {
		service string
		ready   bool
		want    healthpb.HealthCheckResponse_ServingStatus
		code    codes.Code
	}{
		{"", true, healthpb.HealthCheckResponse_SERVING, codes.OK}, {"runtime.v1.RuntimeService", false, healthpb.HealthCheckResponse_NOT_SERVING, codes.OK},
		{"runtime.v1.ImageService", true, healthpb.HealthCheckResponse_SERVING, codes.OK}, {"nonsense", true, 0, codes.NotFound},
	} {
		node.ready.Store(tc.ready)
		resp, err := healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{Service: tc.service})
		wantCode(t, err, tc.code)
		if resp.GetStatus() != tc.want {
			t.Errorf("%q, ready %v: %v", tc.service, tc.ready, resp.GetStatus())
		}
	}
}
