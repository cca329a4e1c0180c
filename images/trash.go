package images

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// takeUnused takes what nothing needs any more out of the store, and returns where it is, for removeTrash.
func (s *Store) takeUnused() (trash []string, err error) {
	take := func(path string, by func(string) (string, error)) error {
		t, err := by(path)
		if err == nil && t != "" {
			trash = append(trash, t)
		}
		return err
	}
	err = s.index.collect(func(diffID string) error { return take(s.layerDir(diffID), s.trash) })
	entries, readErr := os.ReadDir(s.path("fix"))
	err = errors.Join(err, readErr)
	for _, e := range entries {
		id := "sha256:" + e.Name()
		err = errors.Join(err, s.index.collectFix(id, func() error {
			err := take(s.fixDir(id), s.moveToTrash)
			if noRoom(err) {
				return nil // it is a few directories, whole, and has no record without which it would not count
			}
			return err
		}))
	}
	return trash, err
}

// collect removes the layers that nothing needs any more.
func (s *Store) collect() error {
	trash, err := s.takeUnused()
	for _, t := range trash {
		err = errors.Join(err, s.removeTrash(t))
		crash.Point("images/trash-removed")
	}
	return err
}

// trash takes path out of the store at once, by a rename, and returns where it is, for removeTrash. btrfs wants room for a
// new name, of a user whose quota is used up: there a directory loses its record, without which it counts for nothing, and
// stays where it is; a file goes.
func (s *Store) trash(path string) (string, error) {
	trash, err := s.moveToTrash(path)
	if !noRoom(err) {
		return trash, err
	}
	return path, dropRecord(path)
}

func (s *Store) moveToTrash(path string) (string, error) {
	trash := s.path("tmp", "trash-"+rand.Text())
	if err := os.Rename(path, trash); err != nil {
		return "", fmt.Errorf("remove: %w", err)
	}
	crash.Point("images/trashed")
	return trash, nil
}

func noRoom(err error) bool { return errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) }

// dropRecord removes a directory's record, or what is no directory.
func dropRecord(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	if !info.IsDir() {
		return os.Remove(path)
	}
	for _, record := range []string{"layer.json", "rootfs.json"} {
		if err := os.Remove(filepath.Join(path, record)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove: %w", err)
		}
	}
	return nil
}

// removeTrash removes what trash has taken out of the store. It takes long, and needs no lock.
func (s *Store) removeTrash(path string) error {
	switch filepath.Dir(path) {
	case s.path("layers"):
		return removeLeftover(path)
	case s.path("images"):
		return nil // it was a file, and there may be another by now
	}
	return os.RemoveAll(path)
}

// removeLeftover removes a layer's directory that has no record. A pull may put the layer in its place at any moment, and
// do the same before: so the directory is held, and what has its name then is not touched.
func removeLeftover(dir string) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	defer root.Close()
	if _, err := root.Lstat("layer.json"); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // another is as far
		return fmt.Errorf("remove: %w", err)
	}
	for _, e := range entries {
		if err := root.RemoveAll(e.Name()); err != nil {
			return fmt.Errorf("remove what is left of layer %s: %w", filepath.Base(dir), err)
		}
	}
	err = unix.Rmdir(dir)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return fmt.Errorf("remove %s: %w", dir, err)
}
