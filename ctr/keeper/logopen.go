package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// openLog makes no directories: they are the caller's. dir is the caller's word. From there on no symbolic link is
// followed, neither in the last place nor on the way, since a container that has the log directory as a volume could aim
// its log at another file of the user; and all is refused that is no file: the open of a FIFO, and writes to it, would
// wait for a reader (fifo(7)). The kernel looks at the whole way in one call, so that nothing can be exchanged meanwhile.
//
// Without dir, which a daemon of before does not send, only the last place is looked at.
func openLog(dir, path string) (*os.File, error) {
	f, err := openBeneath(dir, path)
	if err != nil {
		return nil, fmt.Errorf("open container log: %w", replaced(dir, path, err))
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = replaced(dir, path, unix.ENXIO)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open container log: %w", err), f.Close())
	}
	return f, nil
}

const (
	logFlags = unix.O_WRONLY | unix.O_CREAT | unix.O_APPEND | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	logMode  = 0o640
)

func openBeneath(dir, path string) (*os.File, error) {
	if dir == "" {
		return os.OpenFile(path, logFlags, logMode)
	}
	name, err := belowLogDir(dir, path)
	if err != nil {
		return nil, err
	}
	at, err := unix.Open(filepath.Clean(dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(at)
	how := unix.OpenHow{Flags: logFlags, Mode: logMode, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for again := 0; ; {
		fd, err := unix.Openat2(at, name, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN) && again < logRaces:
			again++
		default:
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// logRaces bounds how often a rename may come between (openat2(2)): a lease on the file (fcntl(2)), which a container can
// take, gives the same error for as long as it is held.
const logRaces = 8

// belowLogDir returns the way from dir to path.
func belowLogDir(dir, path string) (string, error) {
	name, err := filepath.Rel(dir, path)
	if err != nil || !filepath.IsAbs(dir) || !filepath.IsLocal(name) || name == "." {
		return "", fmt.Errorf("log path %q is not below the log directory %q: %w", path, dir, wire.ErrBadRequest)
	}
	return name, nil
}

// replaced says in words what the kernel found in the place of a log.
func replaced(dir, path string, err error) error {
	switch {
	case dir != "" && (errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)):
		return fmt.Errorf("%w: on the way from %s to %s is a symbolic link, which is not followed", wire.ErrLogReplaced, dir, path)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w: %s is a symbolic link, which is not followed", wire.ErrLogReplaced, path)
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %s is no regular file", wire.ErrLogReplaced, path)
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("%w: another process keeps %s from being opened, by a lease or by moving what leads to it", wire.ErrLogReplaced, path)
	case dir != "" && errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: on the way from %s to %s is something else than directories", wire.ErrLogReplaced, dir, path)
	}
	return err
}
