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

// origin is one of the places that have a layer's blob.
type origin struct {
	host string // the registry or mirror; "" is this machine
	open func(ctx context.Context) (io.ReadCloser, error)
}

// ensureLayer makes sure that the layer is in the store, trying each place in turn. The caller has pinned the
// layer. However many pulls want it, it is fetched and unpacked once; where the pull that did the work failed
// (its credentials may have been worse), those that waited try by themselves.
//
// Only pulls from the same place share the work: what a layer unpacks to is what the configuration of an image claims, and
// one that claims another's layer and then takes its time is not to hold up the other.
func (s *Store) ensureLayer(ctx context.Context, want layerWant, within *room, places []origin) error {
	key := want.DiffID + " " + places[0].host
	for {
		if s.index.layer(want.DiffID) != nil {
			return nil
		}
		_, joined, err := s.fetch.unpacks.do(ctx, key, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, s.addLayer(ctx, want, within, places)
		})
		if err == nil || !joined || ctx.Err() != nil {
			return err
		}
	}
}

// addLayer fetches and unpacks one layer, and puts it in its place.
func (s *Store) addLayer(ctx context.Context, want layerWant, within *room, places []origin) error {
	var errs []error
	for _, from := range places {
		err := s.addLayerFrom(ctx, want, within, from)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		var errno unix.Errno
		if ctx.Err() != nil || errors.Is(err, ErrRefused) && !errors.Is(err, errMisled) || errors.As(err, &errno) && !errors.Is(err, ErrUnavailable) {
			break // another place would not serve better
		}
	}
	return fmt.Errorf("layer %s: %w", want.Digest, errors.Join(errs...))
}

func (s *Store) addLayerFrom(ctx context.Context, want layerWant, within *room, from origin) error {
	release, err := s.fetch.slots.take(ctx, from.host)
	if err != nil {
		return err
	}
	defer s.wake()
	defer release()
	if s.index.layer(want.DiffID) != nil {
		return nil
	}
	blob, err := from.open(ctx)
	if err != nil {
		return err
	}
	defer blob.Close()
	dir, err := s.tempDir("layer")
	if err != nil {
		return err
	}
	u := undo{func() error { return os.RemoveAll(dir) }}
	rec, err := s.unpackLayer(ctx, dir, want, within, blob)
	if err != nil {
		return u.run(s.full(err))
	}
	crash.Point("images/layer-unpacked")
	// Not synced: the record goes the way of the layer that it describes (see sync.go).
	if err := writeUnsynced(filepath.Join(dir, "layer.json"), rec); err != nil {
		return u.run(s.full(err))
	}
	crash.Point("images/layer-recorded")
	placed, err := s.placeLayer(dir, rec)
	if err != nil {
		return u.run(fmt.Errorf("add layer: %w", err))
	}
	crash.Point("images/layer-placed")
	if !placed {
		return os.RemoveAll(dir)
	}
	return nil
}

// placeLayer puts an unpacked layer in its place, where it is not there already. The caller has pinned it, so that nothing
// new is left over there meanwhile.
func (s *Store) placeLayer(dir string, rec *layerRecord) (placed bool, err error) {
	to := s.layerDir(rec.DiffID)
	if err := removeLeftover(to); err != nil {
		return false, err
	}
	err = s.index.addLayer(rec, func() error {
		placed = true
		if _, err := os.Lstat(filepath.Join(to, "layer.json")); err == nil { // a later version's, which Open has left there
			if err := s.putAside(to, errNewer); err != nil {
				return err
			}
		}
		return os.Rename(dir, to) // also over an empty directory
	})
	return placed, err
}

// wake tells the background goroutine that there may be work.
func (s *Store) wake() {
	select {
	case s.life.kick <- struct{}{}:
	default:
	}
}
