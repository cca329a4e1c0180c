package keeper

import (
	"fmt"
	"io"
	"log/slog"
	"os"

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
