package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

const (
	kindRootfs = "rootfs"
	kindVolume = "volumes"
)

// MountRootfs makes a container's root filesystem from an image, given by id or any of its names, and returns
// where it is mounted. The image's layers stay for as long as the root filesystem does, whatever becomes of the
// image. It fails with ErrExists where the container has one already, and leaves nothing where it fails.
func (s *Store) MountRootfs(ctx context.Context, containerID, imageID string) (string, error) {
	path, err := s.mountImage(ctx, kindRootfs, containerID, imageID)
	if err != nil {
		return "", fmt.Errorf("mount root filesystem of container %s: %w", containerID, err)
	}
	return path, nil
}

// UnmountRootfs unmounts a container's root filesystem and removes what the container wrote. It may be called
// again, and for a container that has none. Processes that still use it keep it until they end, but no longer
// see what is written to the disk.
func (s *Store) UnmountRootfs(containerID string) error {
	if err := s.unmountImage(kindRootfs, containerID); err != nil {
		return fmt.Errorf("unmount root filesystem of container %s: %w", containerID, err)
	}
	return nil
}

// MountImageVolume mounts an image read-only and returns the path of subPath in it ("" is its root). ownerID
// names the mount: it is unique among volumes.
func (s *Store) MountImageVolume(ctx context.Context, ownerID, imageID, subPath string) (string, error) {
	root, err := s.mountImage(ctx, kindVolume, ownerID, imageID)
	if err != nil {
		return "", fmt.Errorf("mount image volume %s: %w", ownerID, err)
	}
	u := undo{func() error { return s.unmountImage(kindVolume, ownerID) }}
	path, err := resolveInside(root, subPath)
	if err != nil {
		return "", u.run(fmt.Errorf("mount image volume %s: sub path %q: %w", ownerID, subPath, err))
	}
	return path, nil
}

// UnmountImageVolume undoes MountImageVolume. It may be called again.
func (s *Store) UnmountImageVolume(ownerID string) error {
	if err := s.unmountImage(kindVolume, ownerID); err != nil {
		return fmt.Errorf("unmount image volume %s: %w", ownerID, err)
	}
	return nil
}

// Reconcile removes the root filesystems and volumes of owners that are not live. Keys are the ids that they were
// mounted by.
func (s *Store) Reconcile(live map[string]bool) error {
	var errs []error
	for _, kind := range []string{kindRootfs, kindVolume} {
		for _, key := range s.index.mountKeys(kind) {
			id := strings.TrimPrefix(key, kind+"/")
			if live[id] {
				continue
			}
			s.log.Info("removing what a container left", "kind", kind, "id", id)
			errs = append(errs, s.unmountImage(kind, id))
		}
	}
	return errors.Join(errs...)
}

// mountImage makes kind/id and mounts the image there.
func (s *Store) mountImage(ctx context.Context, kind, id, image string) (string, error) {
	if err := checkOwnerID(id); err != nil {
		return "", err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	img, err := s.index.find(image)
	if err != nil {
		return "", err
	}
	unpin := s.index.pin(append([]string{fixPin(img.ID)}, img.Layers...))
	defer unpin()
	layers, err := s.layersOf(img.Layers)
	if err != nil {
		return "", err
	}
	var lowers []string
	if img.Fix {
		lowers = append(lowers, s.fixDir(img.ID))
	}
	for _, l := range layers {
		lowers = append(lowers, filepath.Join(s.layerDir(l.DiffID), "diff"))
	}
	key, m := kind+"/"+id, s.mounting()
	if err := s.makeMountDir(key, m.driver, kind == kindRootfs, img); err != nil {
		return "", s.full(err)
	}
	u := undo{func() error { return s.unmountImage(kind, id) }}
	if err := m.mount(ctx, s.path(key), lowers, kind == kindRootfs); err != nil {
		return "", s.full(u.run(err))
	}
	crash.Point("images/mounted")
	return s.path(key, "merged"), nil
}

// makeMountDir makes the directory of a mount with its record, at once: a crash leaves all of it or nothing. It is
// not synced, since neither survives a restart of the machine: the overlay is mounted "volatile", whose upper
// directory must not be used again when it was not unmounted.
func (s *Store) makeMountDir(key, driver string, writable bool, img *imageRecord) error {
	if s.index.mount(key) != nil {
		return ErrExists
	}
	tmp, err := s.tempDir("mount")
	if err != nil {
		return err
	}
	u := undo{func() error { return os.RemoveAll(tmp) }}
	dirs := []string{"merged"}
	if writable {
		dirs = append(dirs, "upper", "work")
	}
	for _, d := range dirs {
		if err := os.Mkdir(filepath.Join(tmp, d), 0o755); err != nil {
			return u.run(fmt.Errorf("make mount directory: %w", err))
		}
	}
	if writable {
		// The root of an overlay has the attributes of its topmost directory.
		if err := setDirMeta(filepath.Join(tmp, "upper"), img.Root); err != nil {
			return u.run(err)
		}
	}
	rec := &rootfsRecord{Version: recordVersion, Image: img.ID, Layers: img.Layers, Fix: img.Fix, Driver: driver}
	if err := writeUnsynced(filepath.Join(tmp, "rootfs.json"), rec); err != nil {
		return u.run(err)
	}
	crash.Point("images/mount-directory-made")
	err = os.Rename(tmp, s.path(key))
	crash.Point("images/mount-directory-placed")
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
		return u.run(ErrExists)
	} else if err != nil {
		return u.run(fmt.Errorf("make mount directory: %w", err))
	}
	s.index.putMount(key, rec)
	return nil
}

func setDirMeta(path string, m dirMeta) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open directory %s: %w", path, err)
	}
	return errors.Join(applyDirMeta(fd, m), unix.Close(fd))
}

// unmountImage undoes mountImage, from whatever point it or an earlier call of this came to.
func (s *Store) unmountImage(kind, id string) error {
	if err := checkOwnerID(id); err != nil {
		return err
	}
	key := kind + "/" + id
	if err := unmount(s.path(key, "merged")); err != nil {
		return err
	}
	if err := s.discard(s.path(key)); err != nil {
		return err
	}
	rec := s.index.mount(key)
	s.index.dropMount(key)
	if kind == kindRootfs {
		s.meter.forget(id)
	}
	if err := s.dropKept(); err != nil {
		return err
	}
	if rec != nil && s.index.image(rec.Image) == nil {
		return s.collect()
	}
	return nil
}

// unmount detaches whatever is mounted on path, however often. MNT_DETACH: a process that the kernel has not
// yet let go must not keep the pod from going away.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
			crash.Point("images/unmounted")
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		case errors.Is(err, unix.EPERM) && !isMountPoint(path):
			return nil // without CAP_SYS_ADMIN the kernel does not even look
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

func isMountPoint(path string) bool {
	var stx unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &stx)
	return err == nil && stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// resolveInside returns the path of sub below root, with symbolic links followed as if root were "/". The image
// is mounted read-only, so the answer stays true.
func resolveInside(root, sub string) (string, error) {
	if sub == "" {
		return root, nil
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := openat2(dir, sub, &how)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return "", fmt.Errorf("the image has no such path: %w", ErrNotFound)
	} else if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if mode := st.Mode & unix.S_IFMT; mode != unix.S_IFDIR && mode != unix.S_IFREG {
		return "", fmt.Errorf("%w: it is neither a directory nor a file", ErrInvalid)
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	if path != root && !strings.HasPrefix(path, root+"/") {
		return "", fmt.Errorf("%w: it leads to %s", ErrRefused, path)
	}
	return path, nil
}
