package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// What reaches the disk, and when.
//
// A layer is many small files. To fsync each of them, or to syncfs the whole filesystem before a pull may end,
// would make a pull wait for the disk many times longer than for the registry, though nothing that is lost in a
// power cut is precious: a layer can be pulled again. What must not happen is that a layer with empty or torn
// files is taken for whole.
//
// So a layer is put into place as soon as it is verified, with a record that names the current boot and says
// that it is not synced. A background goroutine then writes the layer out file by file, and when that and a final
// syncfs(2) are through, marks the record. Open trusts a layer that is marked, or that was written in this boot:
// the page cache survives a SIGKILL. Any other is dropped, and with it the images that need it: a power cut
// within the first seconds after a pull costs a second pull.
//
// Image records and marks are written with fsync, and after what they refer to.

// background removes what recovery found, then syncs layers until the store is closed.
func (s *Store) background(stale []string) {
	for _, path := range stale {
		if s.life.ctx.Err() != nil {
			return // the next Open finds them
		}
		if err := s.removeTrash(path); err != nil {
			s.log.Warn("stale data cannot be removed", "path", path, "error", err)
		}
	}
	var held time.Time // since when layers wait for a pull to end
	for {
		err := sleep(s.life.ctx, s.cfg.waits.settle)
		var again <-chan time.Time
		switch now := time.Now(); {
		case err == nil && s.fetch.slots.busy() && (held.IsZero() || now.Before(held.Add(s.cfg.waits.resync))):
			// Not beside a pull: they would only wait for each other. But a pull may take hours.
			if held.IsZero() {
				held = now
			}
			again = time.After(held.Add(s.cfg.waits.resync).Sub(now))
		case err == nil:
			held = time.Time{}
			err = s.syncLayers()
		}
		if err != nil && s.life.ctx.Err() == nil {
			s.log.Warn("layers are not on stable storage yet", "error", err)
			again = time.After(s.cfg.waits.resync) // the disk may be full, and is not for ever
		}
		select {
		case <-s.life.kick: // by each layer that comes in
		case <-again:
		case <-s.life.ctx.Done():
			return
		}
	}
}

func (s *Store) syncLayers() error {
	layers := s.index.unsynced()
	if len(layers) == 0 {
		return nil
	}
	for _, l := range layers {
		err := writeOut(s.life.ctx, filepath.Join(s.layerDir(l.DiffID), "diff"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // an image may be removed meanwhile
			return err
		}
	}
	if err := syncfs(s.path("layers")); err != nil {
		return err
	}
	for _, l := range layers {
		if err := s.markSynced(l); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// markSynced is writeRecord for a layer that may be thrown away, or come anew, meanwhile: then it is not marked.
func (s *Store) markSynced(l *layerRecord) error {
	marked := *l
	marked.Synced = true
	to := target{filepath.Join(s.layerDir(l.DiffID), "layer.json"), &marked}
	temp, err := s.stageRecord(to)
	if err != nil {
		return err
	}
	replaced, err := s.index.replaceLayer(l, &marked, func() error { return os.Rename(temp, to.path) })
	if !replaced {
		return errors.Join(err, os.Remove(temp))
	}
	crash.Point("images/record-replaced")
	return syncDir(filepath.Dir(to.path))
}

// writeOut starts writing every file below dir and waits for it, one by one, so that it can stop at any of them;
// it leaves the metadata to syncfs. It goes by descriptors: names may be anything that the kernel takes.
func writeOut(ctx context.Context, dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("sync layer: %w", err)
	}
	return writeOutDir(ctx, os.NewFile(uintptr(fd), dir))
}

// writeOutDir takes dir over.
func writeOutDir(ctx context.Context, dir *os.File) error {
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return fmt.Errorf("sync layer: %w", err)
	}
	parent := int(dir.Fd())
	for _, e := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case e.IsDir():
			var fd int
			if fd, err = openDirAt(parent, e.Name()); err == nil {
				err = writeOutDir(ctx, os.NewFile(uintptr(fd), e.Name()))
			}
		case e.Type().IsRegular():
			err = writeOutFile(parent, e.Name())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func writeOutFile(parent int, name string) error {
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("sync layer: %w", err)
	}
	defer unix.Close(fd)
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err = unix.SyncFileRange(fd, 0, 0, all)
	// Filesystems without it (FUSE, overlayfs) are left to syncfs.
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ESPIPE) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("sync layer file %q: %w", name, err)
	}
	return nil
}

func syncfs(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync filesystem: %w", err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync filesystem of %s: %w", path, err)
	}
	return nil
}

// writeUnsynced writes a record in a directory that is still in tmp, and that is worth nothing after a power cut
// with the record or without.
func writeUnsynced(path string, rec any) error {
	raw, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", path, err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}
