package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUp says that the node runs already, and ErrUpElsewhere that it runs with another data directory.
var (
	ErrUp          = errors.New("the node is up already")
	ErrUpElsewhere = fmt.Errorf("%w with another data directory", ErrUp)
)

// Lock is held by a node's parent as long as the node lives; the kernel lets go of it when the process dies. It is that of
// the data directory, in a file there, which is never swept; and that of the runtime directory, which nodes with different
// data directories may have in common. The latter is the directory's own: it needs no room, and no file that a sweep would
// have to spare.
type Lock struct {
	data    *os.File
	runtime *os.File // nil where there was no runtime directory
}

// TryLock takes the node's lock, ErrUp where another process holds it.
func (n Node) TryLock() (*Lock, error) {
	if lock := n.handedOver(); lock != nil {
		return lock, nil
	}
	data, err := n.openLock()
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := flock(data, ErrUp); err != nil {
		return nil, errors.Join(err, data.Close())
	}
	runtime, err := n.lockRuntime()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(err, data.Close())
	}
	return &Lock{data, runtime}, nil
}

func flock(f *os.File, held error) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return held
	case err != nil:
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// lockRuntime locks the directory that is in its place once it is locked: who had it before may just have removed it.
func (n Node) lockRuntime() (*os.File, error) {
	for {
		f, err := os.Open(n.RuntimeDir)
		if err != nil {
			return nil, fmt.Errorf("open runtime directory: %w", err)
		}
		if err := flock(f, ErrUpElsewhere); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if same(int(f.Fd()), n.RuntimeDir) {
			return f, nil
		}
		f.Close()
	}
}

// HoldsRuntime tells whether the runtime directory is locked, too. It is not where there was none.
func (l *Lock) HoldsRuntime() bool { return l.runtime != nil }

// openLock mends what keeps the file from being opened. A mode is mended in place, so that whoever has the lock keeps it.
func (n Node) openLock() (*os.File, error) {
	path := n.lockFile()
	info, err := os.Lstat(path)
	switch {
	case err != nil: // there is none, most likely
	case !info.Mode().IsRegular():
		aside := path + ".unreadable"
		slog.Error("lock set aside: it is no regular file", "path", path, "moved", aside)
		if err := errors.Join(os.RemoveAll(aside), os.Rename(path, aside)); err != nil {
			return nil, err
		}
	case info.Mode().Perm()&0o600 != 0o600 && owner(info) == os.Geteuid():
		if err := os.Chmod(path, 0o600); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
}

// lockEnv names the descriptors of a lock that was handed over: of the data directory, and of the runtime directory.
const lockEnv = "_CORACLE_LOCK_FDS"

// HandOver lets cmd, which is not started yet, take the lock by its TryLock. A lock of flock(2) is the open file's,
// which a child shares: it is held all the way, and Release then lets go of this process's part.
func (l *Lock) HandOver(cmd *exec.Cmd) {
	cmd.ExtraFiles = append(cmd.ExtraFiles, l.data, l.runtime)
	last := 2 + len(cmd.ExtraFiles)
	cmd.Env = append(cmd.Environ(), fmt.Sprintf("%s=%d,%d", lockEnv, last-1, last))
}

// handedOver takes the lock that the process before has handed over, once; nil where there is none.
func (n Node) handedOver() *Lock {
	first, second, _ := strings.Cut(os.Getenv(lockEnv), ",")
	_ = os.Unsetenv(lockEnv) // it is nobody else's; the name is valid
	data, derr := strconv.Atoi(first)
	runtime, rerr := strconv.Atoi(second)
	if derr != nil || rerr != nil || min(data, runtime) < 3 || !same(data, n.lockFile()) || !same(runtime, n.RuntimeDir) {
		return nil
	}
	unix.CloseOnExec(data)
	unix.CloseOnExec(runtime)
	return &Lock{os.NewFile(uintptr(data), n.lockFile()), os.NewFile(uintptr(runtime), n.RuntimeDir)}
}

// same tells whether the path leads to what the descriptor is of.
func same(fd int, path string) bool {
	var ours, theirs unix.Stat_t
	return unix.Fstat(fd, &theirs) == nil && unix.Stat(path, &ours) == nil && ours.Dev == theirs.Dev && ours.Ino == theirs.Ino
}

// Release lets go of the lock.
func (l *Lock) Release() error {
	err := l.data.Close()
	if l.runtime != nil {
		err = errors.Join(err, l.runtime.Close())
	}
	return err
}

// Sweep removes what a node leaves on disk when it dies without ceremony. The caller holds the node's lock.
func (n Node) Sweep() error {
	if err := os.RemoveAll(n.RuntimeDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweep runtime directory: %w", err)
	}
	return nil
}

// Empty is Sweep for who goes on: the directory itself, which is locked, stays, as does a link to it.
func (n Node) Empty() error {
	if info, err := os.Stat(n.RuntimeDir); err != nil || !info.IsDir() {
		return n.Sweep()
	}
	entries, err := os.ReadDir(n.RuntimeDir)
	for _, entry := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(n.RuntimeDir, entry.Name())))
	}
	if err != nil {
		return fmt.Errorf("empty runtime directory: %w", err)
	}
	return nil
}
