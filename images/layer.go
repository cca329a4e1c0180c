package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// openBlob opens a layer's blob from one of the places that have it.
type openBlob func(ctx context.Context) (io.ReadCloser, error)

// ensureLayer makes sure that the layer is in the store, trying each place in turn. The caller has pinned the
// layer. However many pulls want it, it is fetched and unpacked once; where the pull that did the work failed
// (its credentials may have been worse), those that waited try by themselves.
func (s *Store) ensureLayer(ctx context.Context, want layerWant, places []openBlob) error {
	for {
		if s.index.layer(want.DiffID) != nil {
			return nil
		}
		_, joined, err := s.fetch.unpacks.do(ctx, want.DiffID, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, s.addLayer(ctx, want, places)
		})
		if err == nil || !joined || ctx.Err() != nil {
			return err
		}
	}
}

// addLayer fetches and unpacks one layer, and puts it in its place.
func (s *Store) addLayer(ctx context.Context, want layerWant, places []openBlob) error {
	select {
	case s.fetch.slots <- struct{}{}:
		defer func() {
			<-s.fetch.slots
			s.wake()
		}()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.index.layer(want.DiffID) != nil {
		return nil
	}
	if want.Size > s.cfg.MaxLayerBytes {
		return fmt.Errorf("layer %s: blob of %d bytes: %w", want.Digest, want.Size, tooManyBytes(s.cfg.MaxLayerBytes))
	}
	var errs []error
	for _, open := range places {
		err := s.addLayerFrom(ctx, want, open)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		var errno unix.Errno
		if ctx.Err() != nil || errors.Is(err, ErrRefused) || errors.As(err, &errno) && !errors.Is(err, ErrUnavailable) {
			break // another place would not serve better
		}
	}
	return fmt.Errorf("layer %s: %w", want.Digest, errors.Join(errs...))
}

func (s *Store) addLayerFrom(ctx context.Context, want layerWant, open openBlob) (err error) {
	blob, err := open(ctx)
	if err != nil {
		return err
	}
	defer blob.Close()
	dir, err := s.tempDir("layer")
	if err != nil {
		return err
	}
	u := undo{func() error { return os.RemoveAll(dir) }}
	rec, err := s.unpackLayer(ctx, dir, want, blob)
	if err != nil {
		return u.run(s.full(err))
	}
	crash.Point("images/layer-unpacked")
	// Not synced: the record goes the way of the layer that it describes (see sync.go).
	if err := writeUnsynced(filepath.Join(dir, "layer.json"), rec); err != nil {
		return u.run(err)
	}
	crash.Point("images/layer-recorded")
	placed := false
	err = s.index.addLayer(rec, func() error {
		placed = true
		to := s.layerDir(want.DiffID)
		if _, err := os.Lstat(to); err == nil { // a later version's, which Open has left there
			if err := s.putAside(to, errNewer); err != nil {
				return err
			}
		}
		return os.Rename(dir, to)
	})
	if err != nil {
		return u.run(fmt.Errorf("add layer: %w", err))
	}
	crash.Point("images/layer-placed")
	if !placed {
		return os.RemoveAll(dir)
	}
	return nil
}

// wake tells the background goroutine that there may be work.
func (s *Store) wake() {
	select {
	case s.life.kick <- struct{}{}:
	default:
	}
}
