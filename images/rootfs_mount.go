package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The ways to put layers on top of each other, the best first.
const (
	driverOverlay = "overlay"        // the kernel's, with userxattr (Linux 5.11)
	driverFuse    = "fuse-overlayfs" // where the store is on a filesystem that cannot be an upper directory
	driverCopy    = "copy"           // where neither works: every container gets a copy of the whole image
)

// mounter puts layers on top of each other.
type mounter struct {
	driver string
	why    string // why it is not the first choice
	fuse   string // path of the program
	old    bool   // mount(2) instead of the calls of Linux 6.5
	// undecided: there was no room to try, which says nothing of the drivers. It is chosen when a mount is wanted.
	undecided bool
}

// mounting returns the store's mounter.
func (s *Store) mounting() mounter {
	s.mounterMu.Lock()
	defer s.mounterMu.Unlock()
	if s.mounter.undecided {
		s.mounter = chooseMounter(s)
	}
	return s.mounter
}

// chooseMounter tries the drivers where the store is: an upper directory on overlayfs (a node inside a container)
// or on NFS is refused by the kernel only when it is mounted.
func chooseMounter(s *Store) mounter {
	m := mounter{driver: driverOverlay}
	err := m.probe(s)
	if errors.Is(err, errOldKernel) {
		m.old = true
		oldErr := m.probe(s)
		if oldErr == nil {
			return m
		}
		err = errors.Join(oldErr, err)
	}
	if err == nil {
		return m
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		m.undecided, m.why = true, "not tried yet: "+s.full(err).Error()
		return m
	}
	why := "the kernel's overlayfs does not work at " + s.cfg.Root + ": " + err.Error()
	if m.fuse, err = exec.LookPath("fuse-overlayfs"); err == nil {
		m.driver, m.why = driverFuse, why
		if err = m.probe(s); err == nil {
			s.log.Warn("root filesystems are mounted with fuse-overlayfs", "reason", why)
			return m
		}
	}
	m = mounter{driver: driverCopy, why: why + "; nor does fuse-overlayfs: " + err.Error() +
		": every container gets a copy of its image: put the store on ext4, xfs, btrfs or tmpfs, or install fuse-overlayfs"}
	s.log.Warn("root filesystems are copied", "reason", m.why)
	return m
}

// probe mounts a small root filesystem and writes to it.
func (m *mounter) probe(s *Store) (err error) {
	dir, err := s.tempDir("probe")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount(filepath.Join(dir, "merged")), os.RemoveAll(dir)) }()
	for _, d := range []string{"lower", "lower/sub", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return fmt.Errorf("probe: %w", err)
		}
	}
	if err := m.mount(context.Background(), dir, []string{filepath.Join(dir, "lower")}, true); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "merged", "sub")); err != nil { // makes a whiteout
		return fmt.Errorf("probe: %w", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "merged", "sub"), 0o755); err != nil { // an opaque directory
		return fmt.Errorf("probe: %w", err)
	}
	return nil
}

// mount puts lowers, topmost first, together at dir/merged, with dir/upper and dir/work where it is writable.
func (m *mounter) mount(ctx context.Context, dir string, lowers []string, writable bool) error {
	if m.driver == driverCopy {
		return copyRootfs(ctx, dir, lowers, writable)
	}
	// An overlay needs a lower directory, and without an upper one needs two.
	need := 2
	if writable {
		need = 1
	}
	for i := 0; len(lowers) < need; i++ {
		empty := filepath.Join(dir, "empty"+strconv.Itoa(i))
		if err := os.Mkdir(empty, 0o755); err != nil {
			return fmt.Errorf("mount overlay: %w", err)
		}
		lowers = append(lowers, empty)
	}
	if m.driver == driverFuse {
		return m.mountFuse(ctx, dir, lowers, writable)
	}
	if m.old {
		return mountOverlayOld(dir, lowers, writable)
	}
	return mountOverlay(dir, lowers, writable)
}

// errOldKernel: the kernel has no "lowerdir+" (before 6.5).
var errOldKernel = errors.New("lowerdir+ is not known")

// mountOverlay uses the calls in which every lower directory is an option of its own: the single page of options
// that mount(2) takes is full after a few dozen.
func mountOverlay(dir string, lowers []string, writable bool) (err error) {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return errOldKernel
	} else if err != nil {
		return fmt.Errorf("open overlay filesystem: %w", err)
	}
	defer unix.Close(fsfd)
	opts := &optionPaths{}
	defer opts.close()
	// user.overlay.* instead of trusted.overlay.*, which is the initial namespace's.
	if err := unix.FsconfigSetFlag(fsfd, "userxattr"); err != nil {
		return fsError(fsfd, "set userxattr", err)
	}
	for _, l := range lowers {
		err := unix.FsconfigSetString(fsfd, "lowerdir+", opts.path(l))
		if errors.Is(err, unix.EINVAL) && l == lowers[0] {
			return errOldKernel
		} else if err != nil {
			return fsError(fsfd, "add layer "+l, err)
		}
	}
	if writable {
		for _, o := range []string{"upper", "work"} {
			if err := unix.FsconfigSetString(fsfd, o+"dir", opts.path(filepath.Join(dir, o))); err != nil {
				return fsError(fsfd, "set "+o+"dir", err)
			}
		}
		// No sync of a container reaches the disk: what it writes here does not outlive the machine's run.
		if err := unix.FsconfigSetFlag(fsfd, "volatile"); err != nil {
			return fsError(fsfd, "set volatile", err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); errors.Is(err, unix.EINVAL) {
		// Before Linux 6.5 overlayfs gets its options as one string, and looks at none before this.
		return errors.Join(errOldKernel, fsError(fsfd, "create overlay", err))
	} else if err != nil {
		return fsError(fsfd, "create overlay", err)
	}
	attr := 0
	if !writable {
		attr = unix.MOUNT_ATTR_RDONLY
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return fsError(fsfd, "make mount", err)
	}
	defer unix.Close(mfd)
	target := filepath.Join(dir, "merged")
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount overlay at %s: %w", target, err)
	}
	return nil
}

// fsError adds what the kernel has to say, which it keeps on the filesystem context's descriptor.
func fsError(fsfd int, what string, err error) error {
	var said []string
	buf := make([]byte, 1024)
	for {
		n, readErr := unix.Read(fsfd, buf)
		if readErr != nil || n <= 0 {
			break
		}
		said = append(said, strings.TrimSpace(strings.TrimLeft(string(buf[:n]), "ewi ")))
	}
	if len(said) > 0 {
		return fmt.Errorf("mount overlay: %s: %w (%s)", what, err, strings.Join(said, "; "))
	}
	return fmt.Errorf("mount overlay: %s: %w", what, err)
}

// optionPaths makes long paths fit: fsconfig(2) takes strings of up to 255 bytes.
type optionPaths struct{ fds []int }

func (o *optionPaths) path(p string) string {
	if len(p) < 256 {
		return p
	}
	fd, err := unix.Open(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return p // the kernel will say what is wrong with it
	}
	o.fds = append(o.fds, fd)
	return "/proc/self/fd/" + strconv.Itoa(fd)
}

func (o *optionPaths) close() {
	for _, fd := range o.fds {
		unix.Close(fd)
	}
}

// mountOverlayOld uses mount(2), whose options must fit into a page: the layers are named by links "0", "1", …
// in the working directory. Only a thread of its own can change that, and the thread ends with the call.
func mountOverlayOld(dir string, lowers []string, writable bool) error {
	links := filepath.Join(dir, "l")
	if err := os.Mkdir(links, 0o700); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	names := make([]string, len(lowers))
	u := undo{func() error { return os.RemoveAll(links) }}
	for i, l := range lowers {
		names[i] = strconv.Itoa(i)
		if err := os.Symlink(l, filepath.Join(links, names[i])); err != nil {
			return u.run(fmt.Errorf("mount overlay: %w", err))
		}
	}
	options := "userxattr,lowerdir=" + strings.Join(names, ":")
	flags := uintptr(unix.MS_RDONLY)
	if writable {
		flags = 0
		options += ",upperdir=../upper,workdir=../work,volatile"
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Chdir(links)
		}
		if err == nil {
			err = unix.Mount("overlay", "../merged", "overlay", flags, options)
		}
		result <- err
	}()
	err := <-result
	if err != nil {
		err = fmt.Errorf("mount overlay: %w", err)
	}
	if err := errors.Join(err, os.RemoveAll(links)); err != nil {
		return err
	}
	return nil
}

// mountFuse starts fuse-overlayfs, which goes into the background once it is mounted, and ends when it is
// unmounted.
func (m *mounter) mountFuse(ctx context.Context, dir string, lowers []string, writable bool) error {
	options := "lowerdir=" + strings.Join(lowers, ":")
	if writable {
		options += ",upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")
	}
	cmd := exec.CommandContext(ctx, m.fuse, "-o", options, filepath.Join(dir, "merged"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run fuse-overlayfs: %w: %s", err, shorten(string(out)))
	}
	return nil
}
