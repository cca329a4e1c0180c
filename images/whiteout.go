package images

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// How a layer says that something beneath it is gone.
//
// overlayfs wants a character device 0:0 in the place of a name, and an extended attribute on a directory that
// hides all that it had. Both can be made without privileges, except on a store that is itself on an overlay:
// that refuses the device, and may keep the attribute for itself. There the kernel's overlay cannot be used for
// root filesystems anyway, and the marker files of the layer archives stay as they came: fuse-overlayfs reads
// them, and so does copyRootfs.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutMeta   = ".wh..wh." // AUFS's own bookkeeping, in images of long ago
	opaqueXattr    = "user.overlay.opaque"
)

// makeWhiteout hides name, unless something of that name is in the directory: then it returns EEXIST.
func makeWhiteout(parent int, name string) error {
	err := unix.Mknodat(parent, name, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	return makeMarker(parent, whiteoutPrefix+name)
}

func makeMarker(parent int, name string) error {
	fd, err := unix.Openat(parent, name, unix.O_CREAT|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return unix.Close(fd)
}

func isWhiteout(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// hasMarker tells whether a marker file hides name.
func hasMarker(parent int, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(parent, whiteoutPrefix+name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

func setOpaque(fd int) error {
	err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) {
		return makeMarker(fd, whiteoutOpaque)
	}
	if err != nil {
		return fmt.Errorf("set %s: %w", opaqueXattr, err)
	}
	return nil
}

func isOpaque(fd int) bool {
	var mark [1]byte
	if n, err := unix.Fgetxattr(fd, opaqueXattr, mark[:]); err == nil && n == 1 && mark[0] == 'y' {
		return true
	}
	var st unix.Stat_t
	return unix.Fstatat(fd, whiteoutOpaque, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}
