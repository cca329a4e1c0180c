package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxOpenDirs = 128 // of one layer; several come in at once, and some machines give a process 1024 descriptors
	maxLinks    = 40  // as the kernel's MAXSYMLINKS
	maxDepth    = 512 // of directories in each other: whoever walks them, to remove them for one, has one open at each level
	// What is kept of directories until all is unpacked: dirCost bytes and the name for each, and no more than keptPerEntry
	// for each entry that a layer may have. Many and deep ones are cheap to ask for.
	dirCost      = 200
	keptPerEntry = 64
)

// tree is a directory that a layer is unpacked into. Directories are named by paths from its root and reached
// by openat2(2) with RESOLVE_IN_ROOT, for which the kernel takes the root as "/": a symbolic link that an
// earlier entry left, absolute or full of "..", leads to another place inside. The last part of a name is never
// followed at all. Descriptors of directories are kept, since an archive's entries come in order.
type tree struct {
	root int
	path string         // of root
	open map[string]int // directories by path; closed by trim and flush
	held []int          // no longer found by their path, but in use; closed with them
	dirs *dirNode       // what the archive says of its directories, set by finish
	made int            // directories without an entry that were made
	room int64          // bytes that may still be kept of directories
}

func openTree(dir string, maxEntries int) (tree, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return tree{}, fmt.Errorf("open layer root %s: %w", dir, err)
	}
	t := tree{root: fd, open: map[string]int{}, dirs: &dirNode{}, room: int64(maxEntries) * keptPerEntry}
	if t.path, err = os.Readlink(fdPath(fd)); err != nil {
		return tree{}, errors.Join(fmt.Errorf("open layer root: %w", err), unix.Close(fd))
	}
	// A setgid bit or a default ACL of the directory above would be inherited by everything in the layer.
	err = unix.Fremovexattr(fd, "system.posix_acl_default")
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
		return tree{}, errors.Join(fmt.Errorf("reset layer root: %w", err), unix.Close(fd))
	}
	if err := errors.Join(unix.Fchown(fd, 0, 0), unix.Fchmod(fd, 0o755)); err != nil {
		return tree{}, errors.Join(fmt.Errorf("reset layer root: %w", err), unix.Close(fd))
	}
	return t, nil
}

func (t *tree) close() error {
	t.flush()
	return unix.Close(t.root)
}

// flush closes the kept descriptors. It must follow every removal of a directory or a symbolic link: a path may
// then lead elsewhere.
func (t *tree) flush() {
	for _, fd := range t.held {
		unix.Close(fd)
	}
	t.held = nil
	for name, fd := range t.open {
		unix.Close(fd)
		delete(t.open, name)
	}
}

// trim bounds the kept descriptors. Call it where none is in use.
func (t *tree) trim() {
	if len(t.open)+len(t.held) > maxOpenDirs {
		t.flush()
	}
}

// existingDir returns a descriptor of the directory name, which the tree keeps.
func (t *tree) existingDir(name string) (int, error) {
	if name == "" {
		return t.root, nil
	}
	if fd, ok := t.open[name]; ok {
		return fd, nil
	}
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := openat2(t.root, name, &how)
	if err != nil {
		return -1, fmt.Errorf("open directory: %w", err)
	}
	t.open[name] = fd
	return fd, nil
}

// openat2 retries where a rename anywhere on the machine came between (openat2(2), EAGAIN).
func openat2(root int, name string, how *unix.OpenHow) (int, error) {
	for {
		fd, err := unix.Openat2(root, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// dir is existingDir, and makes what is missing.
func (t *tree) dir(name string) (int, error) { return t.makePath(name, maxLinks) }

func (t *tree) makePath(name string, links int) (int, error) {
	fd, err := t.existingDir(name)
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return fd, err
	}
	above, base := path.Split(name)
	above = strings.TrimSuffix(above, "/")
	parent, err := t.makePath(above, links)
	if err != nil {
		return -1, err
	}
	at := place{fd: parent, base: base, name: name}
	var st unix.Stat_t
	err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		// A link to a directory that this layer does not have: it is made where the link points to.
		return t.followMissing(at, above, links)
	}
	if err == nil && !isWhiteout(&st) {
		return -1, fmt.Errorf("%w: %q is not a directory", ErrRefused, name)
	}
	made, err := t.makeDir(at)
	if err != nil {
		return -1, err
	}
	if made {
		t.made++
	}
	node, err := t.node(name)
	if err != nil {
		return -1, err
	}
	node.meta, node.implied = &dirMeta{Mode: 0o755}, true
	return t.existingDir(name)
}

func (t *tree) followMissing(at place, above string, links int) (int, error) {
	if links == 0 {
		return -1, fmt.Errorf("follow %q: %w", at.name, unix.ELOOP)
	}
	buf := make([]byte, maxPath)
	n, err := unix.Readlinkat(at.fd, at.base, buf)
	if err != nil {
		return -1, fmt.Errorf("read link %q: %w", at.name, err)
	}
	target := string(buf[:n])
	if !strings.HasPrefix(target, "/") {
		target = above + "/" + target
	}
	return t.makePath(cleanName(target), links-1)
}

// makeDir makes the directory at, unless it is there. Anything else in its place gives way; a whiteout does so
// by making the directory opaque, which is what both together mean.
func (t *tree) makeDir(at place) (made bool, err error) {
	if node := t.dirs.find(at.name); node != nil {
		node.implied = false
	}
	if err := t.mayHold(at); err != nil {
		return false, err
	}
	err = unix.Mkdirat(at.fd, at.base, 0o700)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("make directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(at.fd, at.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("make directory: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return false, nil
	}
	if err := t.clear(at); err != nil {
		return false, err
	}
	if err := unix.Mkdirat(at.fd, at.base, 0o700); err != nil {
		return false, fmt.Errorf("make directory: %w", err)
	}
	if !isWhiteout(&st) {
		return true, nil
	}
	fd, err := openDirAt(at.fd, at.base)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	return true, setOpaque(fd)
}

// mayHold refuses a directory that no reader of the whole tree could get at, and one that other tools would take for a
// whiteout: fuse-overlayfs and copyRootfs would remove what its name says.
func (t *tree) mayHold(at place) error {
	if strings.HasPrefix(at.base, whiteoutPrefix) {
		return fmt.Errorf("%w: a directory is called %.300q, which is the name of a whiteout", ErrRefused, at.base)
	}
	// Where the directory really is, whatever links led there.
	above, err := os.Readlink(fdPath(at.fd))
	if err != nil && !errors.Is(err, unix.ENAMETOOLONG) {
		return fmt.Errorf("make directory: %w", err)
	}
	inside := strings.TrimPrefix(above, t.path)
	if err != nil || len(inside)+len(at.base) >= maxPath || strings.Count(inside, "/")+1 > maxDepth {
		return fmt.Errorf("%w: directories are nested more than %d deep, or their path is longer than %d bytes", ErrRefused, maxDepth, maxPath)
	}
	return nil
}

// clear removes what is at a place, with all that is in it: of two entries with one name the later counts.
func (t *tree) clear(at place) error {
	err := unix.Unlinkat(at.fd, at.base, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, unix.EISDIR) {
		// RemoveAll does not follow links, and enters by the descriptor that we hold.
		err = os.RemoveAll(procPath(at.fd, at.base))
		t.dirs.drop(at.name)
	}
	if err != nil {
		return fmt.Errorf("replace: %w", err)
	}
	t.forget(at)
	return nil
}

// forget closes the kept descriptors but the one that at is in, which the caller still uses.
func (t *tree) forget(at place) {
	for name, fd := range t.open {
		if fd == at.fd {
			t.held = append(t.held, fd) // its path may have led through what is gone
		} else {
			unix.Close(fd)
		}
		delete(t.open, name)
	}
}

// node returns what is kept of a directory.
func (t *tree) node(name string) (*dirNode, error) {
	node, made := t.dirs.at(name)
	if made {
		if t.room -= dirCost + int64(len(name)); t.room < 0 {
			return nil, fmt.Errorf("%w: the layer has too many directories, or too deep ones; where that is right, "+
				"raise images.maxLayerEntries (--max-layer-entries)", ErrRefused)
		}
	}
	return node, nil
}

// describe keeps what is to be set on a directory in the end.
func (t *tree) describe(name string, m dirMeta) error {
	node, err := t.node(name)
	if err != nil {
		return err
	}
	node.meta, node.implied = &m, false
	return nil
}

// impliedDirs lists the directories that no entry describes, sorted.
func (t *tree) impliedDirs() []string {
	var implied []string
	_ = t.dirs.walk("", func(name string, node *dirNode) error { // no visit fails
		if node.implied {
			implied = append(implied, name)
		}
		return nil
	})
	slices.Sort(implied)
	return implied
}

// finish sets mode, owner and time of the directories. One that was replaced or can no longer be reached by its
// name is passed over.
func (t *tree) finish(ctx context.Context) error {
	return t.dirs.walk("", func(name string, node *dirNode) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return t.finishDir(name, *node.meta)
	})
}

func (t *tree) finishDir(name string, meta dirMeta) error {
	t.trim()
	above, base := path.Split(name)
	parent, err := t.existingDir(strings.TrimSuffix(above, "/"))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	} else if err != nil {
		return err
	}
	if name == "" {
		base = "."
	}
	fd, err := openDirAt(parent, base)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	} else if err != nil {
		return err
	}
	err = applyDirMeta(fd, meta)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("set attributes of %q: %w", name, err)
	}
	return nil
}

// openDirAt opens a directory, and not through a link.
func openDirAt(parent int, base string) (int, error) {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open directory: %w", err)
	}
	return fd, nil
}
