package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// copyRootfs is what remains where no overlay can be mounted: it applies the layers one after the other to
// dir/merged, lowest first. Files share their blocks where the filesystem can (FICLONE).
func copyRootfs(ctx context.Context, dir string, lowers []string, writable bool) (err error) {
	target := filepath.Join(dir, "merged")
	dst, err := unix.Open(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	defer unix.Close(dst)
	for i := len(lowers) - 1; i >= 0; i-- {
		c := &copier{ctx: ctx, root: target, links: map[uint64]string{}}
		src, err := unix.Open(lowers[i], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("copy image: %w", err)
		}
		err = errors.Join(c.dir(src, dst, ""), unix.Close(src))
		if err != nil {
			return fmt.Errorf("copy image layer %s: %w", lowers[i], err)
		}
	}
	if writable {
		// The root's attributes are on upper, as for an overlay.
		return copyRootMeta(filepath.Join(dir, "upper"), dst)
	}
	if err := unix.Mount(target, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind image volume: %w", err)
	}
	// mount_setattr(2) adds one flag and leaves those alone that a user namespace may not clear.
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, target, 0, &attr); err != nil {
		return errors.Join(fmt.Errorf("make image volume read-only: %w", err), unmount(target))
	}
	return nil
}

func copyRootMeta(from string, dst int) error {
	fd, err := unix.Open(from, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("copy image: %w", err)
	}
	m, err := readDirMeta(fd)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	return applyDirMeta(dst, m)
}

// copier applies one layer.
type copier struct {
	ctx   context.Context
	root  string
	links map[uint64]string // inode in the layer → where it was copied to, from root
}

// dir applies the directory src to the directory dst, which is called name from the root.
func (c *copier) dir(src, dst int, name string) error {
	entries, err := readNames(src)
	if err != nil {
		return err
	}
	// Marker files first: they hide what lower layers have, not what this one has.
	for _, markers := range []bool{true, false} {
		for _, base := range entries {
			if strings.HasPrefix(base, whiteoutPrefix) != markers {
				continue
			}
			if c.ctx.Err() != nil {
				return context.Cause(c.ctx)
			}
			var st unix.Stat_t
			if err := unix.Fstatat(src, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return fmt.Errorf("stat %s: %w", name+"/"+base, err)
			}
			if err := c.entry(src, dst, name+"/"+base, &st); err != nil {
				return fmt.Errorf("copy %s: %w", name+"/"+base, err)
			}
		}
	}
	return nil
}

func readNames(fd int) ([]string, error) {
	// A descriptor of its own: reading moves the offset.
	dup, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory: %w", err)
	}
	f := os.NewFile(uintptr(dup), "directory")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read directory: %w", err)
	}
	return names, nil
}

func (c *copier) entry(src, dst int, name string, st *unix.Stat_t) error {
	base := filepath.Base(name)
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		if base == whiteoutOpaque {
			return nil // seen by subdir
		}
		if hidden == "" || hidden == "." || hidden == ".." {
			return fmt.Errorf("%w: whiteout of no name", ErrRefused)
		}
		return os.RemoveAll(procPath(dst, hidden))
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return c.subdir(src, dst, name, st)
	}
	if err := os.RemoveAll(procPath(dst, base)); err != nil {
		return err
	}
	if isWhiteout(st) {
		return nil
	}
	if first, ok := c.links[st.Ino]; ok && st.Nlink > 1 {
		return unix.Linkat(unix.AT_FDCWD, c.root+first, dst, base, 0)
	}
	if st.Nlink > 1 {
		c.links[st.Ino] = name
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return copyFile(src, dst, base, st)
	case unix.S_IFLNK:
		target, err := os.Readlink(procPath(src, base))
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(target, dst, base); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(dst, base, st.Mode&(unix.S_IFMT|0o7777), 0); err != nil {
			return err
		}
		if err := unix.Fchmodat(dst, base, st.Mode&0o7777, 0); err != nil {
			return err
		}
	}
	if err := unix.Fchownat(dst, base, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return unix.UtimesNanoAt(dst, base, []unix.Timespec{st.Mtim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func (c *copier) subdir(src, dst int, name string, st *unix.Stat_t) error {
	base := filepath.Base(name)
	from, err := openDirAt(src, base)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	var there unix.Stat_t
	err = unix.Fstatat(dst, base, &there, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && (isOpaque(from) || there.Mode&unix.S_IFMT != unix.S_IFDIR) {
		if err := os.RemoveAll(procPath(dst, base)); err != nil {
			return err
		}
	}
	if err := unix.Mkdirat(dst, base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	to, err := openDirAt(dst, base)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	if err := c.dir(from, to, name); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	return applyDirMeta(to, dirMeta{Mode: st.Mode & 0o7777, UID: int(st.Uid), GID: int(st.Gid), MTime: unix.TimespecToNsec(st.Mtim)})
}

func copyFile(src, dst int, base string, st *unix.Stat_t) (err error) {
	in, err := unix.Openat(src, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	from := os.NewFile(uintptr(in), base)
	defer from.Close()
	out, err := unix.Openat(dst, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	to := os.NewFile(uintptr(out), base)
	defer func() { err = errors.Join(err, to.Close()) }()
	if unix.IoctlFileClone(out, in) != nil {
		if _, err := io.Copy(to, from); err != nil { // copy_file_range(2) where it works
			return err
		}
	}
	if err := unix.Fchown(out, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(out, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(in, out); err != nil {
		return err
	}
	return unix.UtimesNanoAt(dst, base, []unix.Timespec{st.Mtim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(from, to int) error {
	list := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, list)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	} else if err != nil {
		return fmt.Errorf("list attributes: %w", err)
	}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "security.selinux") {
			continue
		}
		n, err := unix.Fgetxattr(from, name, value)
		if err == nil {
			err = unix.Fsetxattr(to, name, value[:n], 0)
		}
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("copy attribute %s: %w", name, err)
		}
	}
	return nil
}

// procPath names base in an open directory for calls that have no *at form.
func procPath(fd int, base string) string { return fdPath(fd) + "/" + base }

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
