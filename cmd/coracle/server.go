package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxRequest and maxAnswer bound gRPC messages, in bytes. The clients of the CRI take 16 MiB; an ExecSync answer
	// may carry that much of each stream, to who asks for more.
	maxRequest, maxAnswer = 16 << 20, 40 << 20
	// maxCalls bounds the calls of one connection that are served at once; further ones wait on the client's side.
	maxCalls = 1000
	// maxHeaders bounds the metadata of a call, in bytes. The CRI's clients send some hundred.
	maxHeaders = 64 << 10
	// A client that connects and says nothing, and one that answers no ping any more (stopped, or hung), is let go
	// after this long.
	handshakeTimeout        = 10 * time.Second
	pingEvery, pingPatience = 2 * time.Minute, 20 * time.Second
)

// newServer makes the CRI's gRPC server. A panic in one call becomes Internal and leaves the others alone. Calls that
// stream end with ctx, so that a client which reads events for ever does not hold up the daemon's end.
func newServer(ctx context.Context, c grpcConfig, runtime runtimeapi.RuntimeServiceServer, images runtimeapi.ImageServiceServer,
	log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxSendMsgSize(maxAnswer), grpc.MaxConcurrentStreams(maxCalls),
		grpc.MaxHeaderListSize(maxHeaders), grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingEvery, Timeout: pingPatience}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(logCalls(log), recoverUnary(log)),
		grpc.ChainStreamInterceptor(logStreams(log), recoverStream(log), endStreams(ctx)),
	)
	runtimeapi.RegisterRuntimeServiceServer(s, runtime)
	runtimeapi.RegisterImageServiceServer(s, images)
	if c.Health {
		healthpb.RegisterHealthServer(s, prober{runtime: runtime})
	}
	if c.Reflection {
		reflection.Register(s)
	}
	return s
}

func logCalls(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		began := time.Now()
		resp, err := handler(ctx, req)
		logCall(ctx, log, info.FullMethod, began, err)
		return resp, err
	}
}

func logStreams(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		began := time.Now()
		err := handler(srv, stream)
		logCall(stream.Context(), log, info.FullMethod, began, err)
		return err
	}
}

// logCall does not log the request: it may carry registry credentials.
func logCall(ctx context.Context, log *slog.Logger, method string, began time.Time, err error) {
	level := slog.LevelWarn
	switch status.Code(err) {
	case codes.OK, codes.NotFound, codes.Canceled:
		level = slog.LevelDebug
	}
	log.Log(ctx, level, "call", "method", method, "took", time.Since(began), "err", err)
}

// prober is the health service: healthy while the conditions of the CRI's Status are true that a kubelet needs.
type prober struct {
	healthpb.UnimplementedHealthServer
	runtime runtimeapi.RuntimeServiceServer
}

// Check takes "", for the whole server, and the names of the CRI's services.
func (p prober) Check(ctx context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	switch req.GetService() {
	case "", runtimeapi.RuntimeService_ServiceDesc.ServiceName, runtimeapi.ImageService_ServiceDesc.ServiceName:
	default:
		return nil, status.Errorf(codes.NotFound, "service %q is not served here", req.GetService())
	}
	resp, err := p.runtime.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return nil, err
	}
	answer := &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}
	for _, c := range resp.GetStatus().GetConditions() {
		if !c.GetStatus() && (c.GetType() == runtimeapi.RuntimeReady || c.GetType() == runtimeapi.NetworkReady) {
			answer.Status = healthpb.HealthCheckResponse_NOT_SERVING
		}
	}
	return answer, nil
}

// errEnding is what a stream's client is told when the daemon ends.
var errEnding = status.Error(codes.Unavailable, "the daemon is ending, or is being replaced; pods go on: call again")

// endStreams ends the context of each call that streams with the server's own.
func endStreams(server context.Context) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, cancel := context.WithCancelCause(stream.Context())
		defer cancel(nil)
		defer context.AfterFunc(server, func() { cancel(errEnding) })()
		return handler(srv, endingStream{stream, ctx})
	}
}

type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

func recoverUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		defer func() {
			if p := recovered(log, info.FullMethod, recover()); p != nil {
				err = p
			}
		}()
		return handler(ctx, req)
	}
}

func recoverStream(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		defer func() {
			if p := recovered(log, info.FullMethod, recover()); p != nil {
				err = p
			}
		}()
		return handler(srv, stream)
	}
}

func recovered(log *slog.Logger, method string, reason any) error {
	if reason == nil {
		return nil
	}
	log.Error("panic", "method", method, "reason", reason, "stack", string(debug.Stack()))
	return status.Errorf(codes.Internal, "%s: the daemon has a defect (%v); its log has the stack", method, reason)
}

// listenOwn listens on path for this user alone. A socket that a killed process left is replaced.
func listenOwn(path string, log *slog.Logger) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	// The directory is 0700, so nobody else connects before the chmod either.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict socket: %w", err), l.Close())
	}
	return ownListener{l, log}, nil
}
