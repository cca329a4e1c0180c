package pod

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/pod/streaming"
)

// The sentinels of the package. Each stands for one gRPC code; the sentence around it says the rest.
var (
	errInvalid     = errors.New("invalid argument")
	errNotFound    = errors.New("not found")
	errExists      = errors.New("already exists")
	errState       = errors.New("failed precondition")
	errUnsupported = errors.New("not supported")
	errTimeout     = errors.New("deadline exceeded")
)

// A fault is a sentence for the caller that wraps a sentinel without repeating it.
type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

func invalid(format string, args ...any) error {
	return &fault{errInvalid, fmt.Sprintf(format, args...)}
}
func notFound(format string, args ...any) error {
	return &fault{errNotFound, fmt.Sprintf(format, args...)}
}
func exists(format string, args ...any) error { return &fault{errExists, fmt.Sprintf(format, args...)} }
func wrongState(format string, args ...any) error {
	return &fault{errState, fmt.Sprintf(format, args...)}
}
func unsupported(format string, args ...any) error {
	return &fault{errUnsupported, fmt.Sprintf(format, args...)}
}
func timedOut(format string, args ...any) error {
	return &fault{errTimeout, fmt.Sprintf(format, args...)}
}

// grpcCodes lists what becomes which code; the first match counts.
var grpcCodes = []struct {
	err  error
	code codes.Code
}{
	{errInvalid, codes.InvalidArgument},
	{ctr.ErrInvalid, codes.InvalidArgument},
	{images.ErrInvalid, codes.InvalidArgument},
	{errNotFound, codes.NotFound},
	{images.ErrNotFound, codes.NotFound},
	{ctr.ErrNotFound, codes.NotFound},
	{errExists, codes.AlreadyExists},
	{ctr.ErrExists, codes.AlreadyExists},
	{netslirp.ErrInvalid, codes.InvalidArgument},
	{netslirp.ErrNoAddress, codes.ResourceExhausted},
	{netslirp.ErrUnsupported, codes.Unimplemented},
	{netslirp.ErrPortInUse, codes.FailedPrecondition},
	{netslirp.ErrPortReserved, codes.FailedPrecondition},
	{cgroupv2.ErrInvalidPath, codes.InvalidArgument},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{errState, codes.FailedPrecondition},
	{ctr.ErrNotRunning, codes.FailedPrecondition},
	{errUnsupported, codes.Unimplemented},
	{ctr.ErrUnsupported, codes.FailedPrecondition},
	{errTimeout, codes.DeadlineExceeded},
	{streaming.ErrTooMany, codes.ResourceExhausted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// grpcError is the one place where an error becomes a gRPC status.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range grpcCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// answer ends every RPC: a response, or a status.
func answer[T any](response *T, err error) (*T, error) {
	if err != nil {
		return nil, grpcError(err)
	}
	return response, nil
}
