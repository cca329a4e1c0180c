package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const maxPath = 4096 // PATH_MAX: no container could open a longer name

// unpacker writes the entries of one layer's archive below its root. No entry, however it is named and whatever
// links came before it, reaches anything outside: see unpack_path.go.
type unpacker struct {
	ctx        context.Context // of the one archive that it unpacks
	tree       tree
	ids        idMaps
	refuseIDs  bool
	share      *share // of what the image may unpack to
	entries    int
	buf        []byte
	bytes      uint64
	inodes     uint64
	root       *dirMeta
	opaqueRoot bool
	notes      noteList
}

func newUnpacker(ctx context.Context, s *Store, dir string, sh *share) (*unpacker, error) {
	t, err := openTree(dir, s.cfg.MaxLayerEntries)
	if err != nil {
		return nil, err
	}
	return &unpacker{ctx: ctx, tree: t, ids: s.ids, refuseIDs: s.cfg.RefuseUnmappedIDs, share: sh, buf: make([]byte, streamBuffer)}, nil
}

func (u *unpacker) close() error { return u.tree.close() }

// record tells what was unpacked.
func (u *unpacker) record() *layerRecord {
	made := uint64(u.tree.made)
	rec := &layerRecord{Bytes: u.bytes + made*blockSize, Inodes: u.inodes + made + 1, Root: u.root, OpaqueRoot: u.opaqueRoot, Notes: u.notes.list}
	rec.setImplied(u.tree.impliedDirs())
	return rec
}

func (u *unpacker) unpack(r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !(errors.Is(err, tar.ErrInsecurePath) && h != nil) {
			return corrupt("read layer archive", err)
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("unpack layer entry %.300q: %w", h.Name, refused(err))
		}
	}
	return u.tree.finish(u.ctx)
}

// corrupt marks what a decompressor or the tar reader found wrong; what they only pass on has its own cause.
func corrupt(what string, err error) error {
	if errors.Is(err, ErrRefused) || errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", ErrCorrupt, what, err)
}

// refused marks the errors of the kernel that an archive brings about, and no place that could be better.
func refused(err error) error {
	for _, errno := range []unix.Errno{unix.ELOOP, unix.ENAMETOOLONG, unix.EMLINK, unix.ENOTDIR, unix.EISDIR, unix.ENOENT, unix.EPERM, unix.EINVAL,
		unix.EEXIST} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %w", ErrRefused, err)
		}
	}
	return err
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	u.entries++
	if err := u.share.entriesAre(int64(u.entries + u.tree.made)); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := u.share.fileOf(h.Size); err != nil {
		return err
	}
	if len(h.Name) >= maxPath || len(h.Linkname) >= maxPath {
		return fmt.Errorf("%w: name is longer than %d bytes", ErrRefused, maxPath)
	}
	name := cleanName(h.Name)
	if name == "" {
		return u.rootEntry(h)
	}
	u.tree.trim()
	dir, base := path.Split(name)
	if strings.HasPrefix(name, whiteoutMeta) && name != whiteoutOpaque {
		return nil
	}
	parent, err := u.tree.dir(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return u.whiteout(parent, dir, base)
	}
	return u.create(place{fd: parent, base: base, name: name}, h, content)
}

// cleanName makes an archive's name relative to the root: "..", "." and leading slashes cannot leave it.
func cleanName(name string) string { return path.Clean("/" + name)[1:] }

func (u *unpacker) rootEntry(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return fmt.Errorf("%w: the root is not a directory", ErrRefused)
	}
	return u.directory(place{fd: u.tree.root, base: ".", name: ""}, h)
}

// whiteout hides a name of the lower layers, or all that a directory has there. It has no effect on what this
// layer itself has (OCI image specification, "Whiteouts"), in whichever order they come.
func (u *unpacker) whiteout(parent int, dir, base string) error {
	if base == whiteoutOpaque {
		if dir == "" {
			u.opaqueRoot = true
			return nil
		}
		return setOpaque(parent)
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("%w: whiteout of no name", ErrRefused)
	}
	err := makeWhiteout(parent, hidden)
	if err == nil {
		u.inodes++
		return nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make whiteout: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent, hidden, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("make whiteout: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	fd, err := openDirAt(parent, hidden)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return setOpaque(fd)
}

// place is where an entry goes: base in the directory fd, called name from the layer's root.
type place struct {
	fd   int
	base string
	name string
}

func (u *unpacker) create(at place, h *tar.Header, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(at, h)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.file(at, h, content)
	case tar.TypeSymlink:
		return u.symlink(at, h)
	case tar.TypeLink:
		return u.hardlink(at, h)
	case tar.TypeFifo:
		return u.fifo(at, h)
	case tar.TypeChar, tar.TypeBlock:
		// mknod(2) of a device needs CAP_MKNOD in the first user namespace. A 0:0 device would be a whiteout.
		u.notes.add("device node left out: a user namespace may not make one", at.name)
		return u.tree.clear(at)
	default:
		u.notes.add(fmt.Sprintf("entry of unknown type %q left out", h.Typeflag), at.name)
		return nil
	}
}

// directory makes the directory, or keeps the one that is there with its content. Its mode, owner and time are
// set at the end: entries that follow would change the time, inherit a setgid bit, or not be allowed in.
func (u *unpacker) directory(at place, h *tar.Header) error {
	fd := at.fd
	if at.name != "" {
		made, err := u.tree.makeDir(at)
		if err != nil {
			return err
		}
		if made {
			u.count(blockSize)
		}
		if fd, err = openDirAt(at.fd, at.base); err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	meta := dirMeta{Mode: uint32(h.Mode & 0o7777), MTime: unix.TimespecToNsec(mtime(h))}
	var err error
	if meta.UID, meta.GID, err = u.owner(at, h); err != nil {
		return err
	}
	if err := u.xattrs(fd, "", at, h); err != nil {
		return err
	}
	if at.name == "" {
		u.root = &meta
	}
	return u.tree.describe(at.name, meta)
}

func (u *unpacker) file(at place, h *tar.Header, content io.Reader) error {
	const flags = unix.O_CREAT | unix.O_EXCL | unix.O_WRONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(at.fd, at.base, flags, 0o600)
	if errors.Is(err, unix.EEXIST) {
		if err := u.tree.clear(at); err != nil {
			return err
		}
		fd, err = unix.Openat(at.fd, at.base, flags, 0o600)
	}
	if err != nil {
		return fmt.Errorf("create file: %w", err)
	}
	defer unix.Close(fd)
	written, err := u.write(fd, h, content)
	if err != nil {
		return err
	}
	u.count(written)
	uid, gid, err := u.owner(at, h)
	if err != nil {
		return err
	}
	// chown(2) clears setuid, setgid and file capabilities: it comes first.
	if uid != 0 || gid != 0 {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return fmt.Errorf("change owner: %w", err)
		}
	}
	if err := unix.Fchmod(fd, uint32(h.Mode&0o7777)); err != nil {
		return fmt.Errorf("change mode: %w", err)
	}
	if err := u.xattrs(fd, "", at, h); err != nil {
		return err
	}
	return setTime(at, h)
}

// write copies the content; of a sparse entry it keeps the holes. It returns how many bytes take space.
func (u *unpacker) write(fd int, h *tar.Header, content io.Reader) (written int64, err error) {
	sparse := h.Typeflag == tar.TypeGNUSparse || h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.map"] != ""
	buf := u.buf
	if sparse {
		buf = buf[:holeSize]
	}
	for off := int64(0); off < h.Size; {
		if u.ctx.Err() != nil { // the content may be a hole of any size, or be in memory already
			return written, context.Cause(u.ctx)
		}
		n, err := io.ReadFull(content, buf[:min(int64(len(buf)), h.Size-off)])
		if err != nil {
			return written, corrupt("read file content", err)
		}
		if sparse && allZero(buf[:n]) {
			off += int64(n)
			continue
		}
		if err := writeAll(fd, buf[:n], off); err != nil {
			return written, err
		}
		off += int64(n)
		written += int64(n)
	}
	if sparse {
		if err := unix.Ftruncate(fd, h.Size); err != nil {
			return written, fmt.Errorf("set file size: %w", err)
		}
	}
	return written, nil
}

func (u *unpacker) symlink(at place, h *tar.Header) error {
	err := unix.Symlinkat(h.Linkname, at.fd, at.base)
	if errors.Is(err, unix.EEXIST) {
		if err := u.tree.clear(at); err != nil {
			return err
		}
		err = unix.Symlinkat(h.Linkname, at.fd, at.base)
	}
	if err != nil {
		return fmt.Errorf("create symlink: %w", err)
	}
	u.count(0)
	return u.finishNode(at, h)
}

// hardlink links to a name in this layer. The link's directory is resolved inside the root like any other, and
// linkat(2) without AT_SYMLINK_FOLLOW does not follow a link in the last place.
func (u *unpacker) hardlink(at place, h *tar.Header) error {
	target := cleanName(h.Linkname)
	if target == "" || target == at.name {
		return fmt.Errorf("%w: hard link to itself or to the root", ErrRefused)
	}
	dir, base := path.Split(target)
	dir = strings.TrimSuffix(dir, "/")
	fd, err := u.tree.existingDir(dir)
	if err == nil {
		err = unix.Linkat(fd, base, at.fd, at.base, 0)
	}
	if errors.Is(err, unix.EEXIST) {
		if same, sameErr := sameFile(fd, base, at); sameErr != nil || same {
			return sameErr
		}
		if err := u.tree.clear(at); err != nil {
			return err
		}
		if fd, err = u.tree.existingDir(dir); err == nil { // clear closed the kept one
			err = unix.Linkat(fd, base, at.fd, at.base, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("hard link to %.300q: %w", h.Linkname, err)
	}
	return nil
}

func (u *unpacker) fifo(at place, h *tar.Header) error {
	if err := u.tree.clear(at); err != nil {
		return err
	}
	if err := unix.Mknodat(at.fd, at.base, unix.S_IFIFO|0o600, 0); err != nil {
		return fmt.Errorf("create fifo: %w", err)
	}
	u.count(0)
	return u.finishNode(at, h)
}

func (u *unpacker) count(bytes int64) {
	u.inodes++
	u.bytes += uint64(bytes+blockSize-1) / blockSize * blockSize
}
