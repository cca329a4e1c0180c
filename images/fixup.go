package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// Builders leave out directories: a layer may have tmp/x and no entry for tmp. Unpacked by itself such a layer
// gets a tmp made up, 0755 and root's, and since the overlay takes a directory's attributes from the topmost
// layer that has it, /tmp would lose its sticky bit. A layer cannot be unpacked on top of those beneath it
// (layers are shared, and unpacked in parallel), so the store notes which directories were made up. Where a lower
// layer does describe one differently, the image gets a layer of its own on top, fix/HEX, with nothing in it
// but those directories.

// layersOf returns the records of an image's layers that can be seen, topmost first: what lies beneath a layer
// with an opaque root is hidden, and a layer that occurs twice shows nothing below that it does not show above
// (overlayfs refuses one directory twice).
func (s *Store) layersOf(diffIDs []string) ([]*layerRecord, error) {
	var out []*layerRecord
	seen := map[string]bool{}
	for _, d := range slices.Backward(diffIDs) {
		if seen[d] {
			continue
		}
		seen[d] = true
		r := s.index.layer(d)
		if r == nil {
			return nil, fmt.Errorf("layer %s: %w", d, ErrNotFound)
		}
		out = append(out, r)
		if r.OpaqueRoot {
			break
		}
	}
	return out, nil
}

// rootMeta is the attributes of the image's root directory: those of the topmost layer that gives any.
func rootMeta(layers []*layerRecord) dirMeta {
	for _, l := range layers {
		if l.Root != nil {
			return *l.Root
		}
	}
	return dirMeta{Mode: 0o755}
}

// makeFix makes fix/HEX for an image whose layers are in the store, where it needs one. The caller has pinned
// the layers and fixPin(id).
func (s *Store) makeFix(ctx context.Context, id string, layers []*layerRecord) (needed bool, err error) {
	want := map[string]dirMeta{}
	for i, l := range layers {
		for _, dir := range l.impliedDirs() {
			if ctx.Err() != nil {
				return false, context.Cause(ctx)
			}
			if _, done := want[dir]; done {
				continue
			}
			if top, err := s.topmost(layers[:i], dir); err != nil || top {
				if err != nil {
					return false, err
				}
				continue
			}
			m, found, err := s.described(layers[i+1:], dir)
			if err != nil {
				return false, err
			}
			if found && (m.Mode != 0o755 || m.UID != 0 || m.GID != 0) {
				want[dir] = m
			}
		}
	}
	if len(want) == 0 {
		return false, nil
	}
	tmp, err := s.tempDir("fix")
	if err != nil {
		return false, err
	}
	u := undo{func() error { return os.RemoveAll(tmp) }}
	if err := s.fillFix(ctx, tmp, want, layers); err != nil {
		return false, u.run(fmt.Errorf("make directories that layers left out: %w", err))
	}
	crash.Point("images/fix-made")
	err = os.Rename(tmp, s.fixDir(id))
	crash.Point("images/fix-placed")
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return true, os.RemoveAll(tmp) // an older pull of this image made the same, and it may be mounted
	}
	if err != nil {
		return false, u.run(fmt.Errorf("make directories that layers left out: %w", err))
	}
	return true, syncDir(s.path("fix"))
}

// topmost tells whether one of the layers above has dir in whatever form: then its attributes count there.
func (s *Store) topmost(above []*layerRecord, dir string) (bool, error) {
	for _, l := range above {
		found, _, hidden, err := s.lookDown(l, dir)
		if err != nil {
			return false, err
		}
		if hidden || found && !l.implies(dir) {
			return true, nil
		}
	}
	return false, nil
}

// described returns the attributes that the layers, topmost first, give to dir.
func (s *Store) described(layers []*layerRecord, dir string) (dirMeta, bool, error) {
	for _, l := range layers {
		found, m, hidden, err := s.lookDown(l, dir)
		if err != nil {
			return dirMeta{}, false, err
		}
		if found && !l.implies(dir) {
			return m, true, nil
		}
		if hidden {
			return dirMeta{}, false, nil
		}
	}
	return dirMeta{}, false, nil
}

// lookDown looks for the directory dir in one layer. hidden tells that the layers beneath do not show through at
// that path: something other than a directory is there, or an opaque directory on the way.
func (s *Store) lookDown(l *layerRecord, dir string) (found bool, m dirMeta, hidden bool, err error) {
	fd, err := unix.Open(filepath.Join(s.layerDir(l.DiffID), "diff"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, m, false, fmt.Errorf("look at layer %s: %w", l.DiffID, err)
	}
	defer func() { unix.Close(fd) }()
	for _, part := range strings.Split(dir, "/") {
		next, err := unix.Openat(fd, part, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		switch {
		case errors.Is(err, unix.ENOENT):
			return false, m, hidden || hasMarker(fd, part), nil
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return false, m, true, nil
		case err != nil:
			return false, m, false, fmt.Errorf("look at %s in layer %s: %w", dir, l.DiffID, err)
		}
		unix.Close(fd)
		fd = next
		hidden = hidden || isOpaque(fd)
	}
	m, err = readDirMeta(fd)
	return err == nil, m, hidden, err
}

func readDirMeta(fd int) (dirMeta, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return dirMeta{}, fmt.Errorf("stat directory: %w", err)
	}
	return dirMeta{Mode: st.Mode & 0o7777, UID: int(st.Uid), GID: int(st.Gid), MTime: unix.TimespecToNsec(st.Mtim)}, nil
}

// fillFix makes the wanted directories below root, and those above them with the attributes that they have in
// the image, which this topmost layer would otherwise change.
func (s *Store) fillFix(ctx context.Context, root string, want map[string]dirMeta, layers []*layerRecord) (err error) {
	t, err := openTree(root, s.cfg.MaxLayerEntries)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	for dir, m := range want {
		if _, err := t.dir(dir); err != nil {
			return err
		}
		if err := t.describe(dir, m); err != nil {
			return err
		}
	}
	for _, dir := range t.impliedDirs() {
		m, found, err := s.described(layers, dir)
		if err != nil {
			return err
		}
		if found {
			if err := t.describe(dir, m); err != nil {
				return err
			}
		}
	}
	if err := t.describe("", rootMeta(layers)); err != nil {
		return err
	}
	if err := t.finish(ctx); err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return syncDir(path)
	})
}
