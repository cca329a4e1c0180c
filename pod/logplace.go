package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// makeLogPlace makes the directory that a container's log lies in. logs is the sandbox's log_directory, the caller's word:
// links on the way to it are followed, as /var/log may be one. What is below it a container may have as a volume and
// exchange, so from there on each directory is made in the one before and no link is followed. path is below logs.
func makeLogPlace(logs, path string) error {
	if err := os.MkdirAll(logs, 0o700); err != nil {
		return err
	}
	name, err := filepath.Rel(logs, filepath.Dir(path))
	if err != nil || !filepath.IsLocal(name) {
		return errors.Join(fmt.Errorf("%s is not below %s", path, logs), err)
	}
	at, err := unix.Open(filepath.Clean(logs), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: logs, Err: err}
	}
	defer func() { unix.Close(at) }()
	if name == "." {
		return nil
	}
	dir := filepath.Clean(logs)
	for part := range strings.SplitSeq(name, "/") {
		dir = filepath.Join(dir, part)
		next, err := makeDirAt(at, part)
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return fmt.Errorf("%w: %s is a link, or something else that is no directory", ctr.ErrLogReplaced, dir)
		}
		if err != nil {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: err}
		}
		unix.Close(at)
		at = next
	}
	return nil
}

// makeDirAt opens the directory name, a single part of a path, in the directory at, and makes it where it is missing.
func makeDirAt(at int, name string) (int, error) {
	if err := unix.Mkdirat(at, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	return unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}
