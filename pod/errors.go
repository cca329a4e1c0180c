package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	crierrors "k8s.io/cri-api/pkg/errors"

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
	errTooMuch     = errors.New("resource exhausted")
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
func tooMuch(format string, args ...any) error {
	return &fault{errTooMuch, fmt.Sprintf(format, args...)}
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
	{images.ErrFull, codes.ResourceExhausted},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
	{errState, codes.FailedPrecondition},
	{ctr.ErrNotRunning, codes.FailedPrecondition},
	{ctr.ErrLogReplaced, codes.FailedPrecondition},
	{errUnsupported, codes.Unimplemented},
	{ctr.ErrUnsupported, codes.FailedPrecondition},
	{errTimeout, codes.DeadlineExceeded},
	{errTooMuch, codes.ResourceExhausted},
	{streaming.ErrTooMany, codes.ResourceExhausted},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// imageVolumeError marks what went wrong with an image volume.
type imageVolumeError struct{ error }

func (e imageVolumeError) Unwrap() error { return e.error }

// grpcError is the one place where an error becomes a gRPC status.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	if ended, ok := status.FromError(err); ok {
		return ended.Err() // what the server gave a stream's context for the cause of its end
	}
	text := err.Error()
	if volume := (imageVolumeError{}); errors.As(err, &volume) {
		// The kubelet tells these failures by how the message begins (k8s.io/cri-api/pkg/errors).
		text = crierrors.ErrImageVolumeMountFailed.Error() + ": " + text
	}
	text += roomHint(err)
	for _, c := range grpcCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, text)
		}
	}
	return status.Error(codes.Internal, text)
}

// roomHint says what to do about a directory that is full. The image store says so itself.
func roomHint(err error) string {
	if errors.Is(err, images.ErrFull) || !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return ""
	}
	where := "the node's directories"
	if at := (*fs.PathError)(nil); errors.As(err, &at) {
		where = filepath.Dir(at.Path)
	} else if at := (*os.LinkError)(nil); errors.As(err, &at) {
		where = filepath.Dir(at.New)
	}
	if errors.Is(err, syscall.EDQUOT) {
		return "; your quota on the filesystem of " + where + " is used up: make room there (quota -s shows it, where it is a user's), and try again"
	}
	return "; make room on the filesystem of " + where + " (df -h and df -i show what has run out), and try again"
}

// answer ends every RPC: a response, or a status.
func answer[T any](response *T, err error) (*T, error) {
	if err != nil {
		return nil, grpcError(err)
	}
	return response, nil
}

// guarded makes a panic in a goroutine of an RPC the error of that RPC, as the server does for the RPC's own goroutine.
func (s *Service) guarded(fn func() error) func() error {
	return func() error { return guarded(s.cfg.Log, fn) }
}

// guarded calls fn and returns its error, one that tells of a defect where it panics.
func guarded(log *slog.Logger, fn func() error) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			log.Error("panic", "reason", reason, "stack", string(debug.Stack()))
			err = fmt.Errorf("the daemon has a defect (%v); its log has the stack", reason)
		}
	}()
	return fn()
}
