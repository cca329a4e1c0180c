package images

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// The classes of failure that callers tell apart with errors.Is. The text of an error says the rest.
var (
	// ErrNotFound: no such image here, or no such image in the registry.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: the request itself is wrong.
	ErrInvalid = errors.New("invalid")
	// ErrExists: a root filesystem of that container id is there already.
	ErrExists = errors.New("already exists")
	// ErrDenied: the registry refused the credentials, or wants some.
	ErrDenied = errors.New("access denied")
	// ErrUnavailable: the registry cannot be reached, or has asked to be left alone for a while.
	ErrUnavailable = errors.New("registry unavailable")
	// ErrDigest: what was received is not what its digest promised.
	ErrDigest = errors.New("digest mismatch")
	// ErrCorrupt: a layer's blob is no archive, or not one of a kind that is known here.
	ErrCorrupt = errors.New("layer cannot be read")
	// ErrRefused: the image is whole, but is not something that this store unpacks.
	ErrRefused = errors.New("image refused")
	// errMisled is ErrRefused for where a registry leads: another place may serve, and else the configuration has to change.
	errMisled = fmt.Errorf("%w", ErrRefused)
	// ErrFull: there is no room for the image store, or no quota of it left; the text says where and what to do.
	ErrFull = errors.New("image store is full")
	// ErrLocked: another process has the store open.
	ErrLocked = errors.New("store is in use")
	// ErrClosed: the store was closed while the call ran.
	ErrClosed = errors.New("store is closed")
)

var grpcCodes = []struct {
	err  error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{ErrInvalid, codes.InvalidArgument},
	{ErrExists, codes.AlreadyExists},
	{ErrDenied, codes.PermissionDenied},
	{ErrNotFound, codes.NotFound},
	{ErrDigest, codes.DataLoss},
	{ErrCorrupt, codes.DataLoss},
	{ErrRefused, codes.FailedPrecondition},
	{ErrFull, codes.ResourceExhausted},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
	{ErrLocked, codes.Unavailable},
	{ErrClosed, codes.Unavailable},
}

// grpcError gives err the status code that CRI clients act on. The kubelet tells a registry that is away from
// other failures by the prefix of the message (k8s.io/cri-api/pkg/errors).
func grpcError(err error) error {
	if err == nil {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if errors.Is(err, errDefect) { // whatever else went wrong beside it
		return status.Error(codes.Internal, err.Error())
	}
	if errors.Is(err, ErrUnavailable) {
		msg := err.Error()
		if !strings.HasPrefix(msg, crierrors.ErrRegistryUnavailable.Error()) {
			msg = crierrors.ErrRegistryUnavailable.Error() + ": " + msg
		}
		return status.Error(codes.Unavailable, msg)
	}
	for _, c := range grpcCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// full adds to an error for which there was no room where that was, what ran out, and what makes room.
func (s *Store) full(err error) error {
	what := "space"
	switch {
	case errors.Is(err, ErrFull): // told where it was seen, before what was written went away again
		return err
	case errors.Is(err, unix.EDQUOT):
		what = "quota"
	case !errors.Is(err, unix.ENOSPC):
		return err
	default:
		var st unix.Statfs_t
		if unix.Statfs(s.cfg.Root, &st) == nil && scarce(&st) {
			what = "inodes"
		}
	}
	return fmt.Errorf("%w: no %s left for %s: remove images (crictl rmi --prune) or containers, or make room there: %w", ErrFull, what, s.cfg.Root, err)
}

// scarce tells whether it is inodes that a full filesystem lacks: hardly any are left, a smaller share than of its bytes. Some
// of either may have come back since it was full.
func scarce(st *unix.Statfs_t) bool {
	inodes, bytes := float64(st.Ffree)/float64(max(st.Files, 1)), float64(st.Bavail)/float64(max(st.Blocks, 1))
	return st.Files > 0 && inodes < 0.05 && inodes < bytes
}

// isAbsent tells that err means no more than that there is no such thing.
func isAbsent(err error) bool { return errors.Is(err, ErrNotFound) }

// undo is a last-in-first-out stack of what gives back the things acquired so far.
type undo []func() error

// run gives everything back and joins what failed to err; call it once, on the way out with an error.
func (u undo) run(err error) error {
	errs := []error{err}
	for i := len(u) - 1; i >= 0; i-- {
		errs = append(errs, u[i]())
	}
	return errors.Join(errs...)
}
