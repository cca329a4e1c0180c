package keeper

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Prepare makes the calling process fit to keep containers. Call it once, before Open.
func Prepare(log *slog.Logger) error {
	// Orphans of containers in the node's pid namespace come to the keeper and not to the node's PID 1, so that
	// the end of a container can wait for them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	// No core file (core(5)): the specs that pass through hold the environment of containers.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	// CRI mount propagation is between the node's mounts and a container's: "/" must be shared for volumes that
	// are mounted later to reach containers, and for Bidirectional ones to come back.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	// os finds out about pidfds by a child of its own, which the reaper must not meet.
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Release()
	}
	logrus.SetOutput(io.Discard)
	logrus.AddHook(logHook{log})
	return nil
}

const keyringEnv = "_CORACLE_KEEPER_KEYRING"

// keyringPerm lets the possessor of the session keyring view, read and search it, and nobody add to it or change its
// permissions (keyctl_setperm(3)).
const keyringPerm = 0x0b000000

// LeaveKeyring puts the keeper, and so every container, into an empty session keyring that cannot be written. A keyring
// a container, libcontainer's default, counts against the user's quota (kernel.keys.maxkeys, 200): no more than some
// 190 containers would start. One that is shared and writable would carry keys from pod to pod, and the user's own
// session keyring must not be seen at all. A program that wants to keep keys joins a session keyring of its own.
//
// The session keyring belongs to a thread (keyrings(7)): the program is executed anew on the thread that joined, so
// that all of its threads, and what they start, have it. Call it first of all; it returns in the new program.
func LeaveKeyring() error {
	if os.Getenv(keyringEnv) != "" {
		return os.Unsetenv(keyringEnv)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ring, err := unix.KeyctlJoinSessionKeyring("coracle")
	if errors.Is(err, unix.ENOSYS) {
		return nil // a kernel without keyrings
	}
	if err != nil {
		return fmt.Errorf("join a session keyring: %w", err)
	}
	if err := unix.KeyctlSetperm(ring, keyringPerm); err != nil {
		return fmt.Errorf("restrict the session keyring: %w", err)
	}
	// The descriptors of the shell that the node was started from are not for the keeper and what it starts. Linux 5.11
	// has the call; without it, as without the descriptors, all works.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("drop inherited descriptors: %w", err)
	}
	if err := unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), keyringEnv+"=joined")); err != nil {
		return fmt.Errorf("execute the keeper anew: %w", err)
	}
	return nil
}

// logHook passes libcontainer's log on to the keeper's.
type logHook struct{ log *slog.Logger }

func (logHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logHook) Fire(e *logrus.Entry) error {
	var attrs []any
	for key, value := range e.Data {
		attrs = append(attrs, key, value)
	}
	switch {
	case e.Level <= logrus.ErrorLevel:
		h.log.Error(e.Message, attrs...)
	case e.Level == logrus.WarnLevel:
		h.log.Warn(e.Message, attrs...)
	default:
		h.log.Debug(e.Message, attrs...)
	}
	return nil
}
