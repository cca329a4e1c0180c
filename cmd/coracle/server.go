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
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage bounds a gRPC message both ways, in bytes: an ExecSync answer carries 16 MiB of each stream.
const maxMessage = 40 << 20

// newServer makes the CRI's gRPC server. A panic in one call becomes Internal and leaves the others alone.
func newServer(runtime runtimeapi.RuntimeServiceServer, images runtimeapi.ImageServiceServer, log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(logCalls(log), recoverUnary(log)),
		grpc.ChainStreamInterceptor(recoverStream(log)),
	)
	runtimeapi.RegisterRuntimeServiceServer(s, runtime)
	runtimeapi.RegisterImageServiceServer(s, images)
	return s
}

func logCalls(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		began := time.Now()
		resp, err := handler(ctx, req)
		level := slog.LevelDebug
		if err != nil && status.Code(err) != codes.NotFound {
			level = slog.LevelWarn
		}
		// The request is not logged: it may carry registry credentials.
		log.Log(ctx, level, "call", "method", info.FullMethod, "took", time.Since(began), "err", err)
		return resp, err
	}
}

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

// listenCRI listens on path for this user alone. A socket that a killed daemon left is replaced.
func listenCRI(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	// The directory is 0700, so nobody else connects before the chmod either.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict socket: %w", err), l.Close())
	}
	return l, nil
}
