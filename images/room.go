package images

import (
	"fmt"
	"sync/atomic"
)

// room is what the layers of one image that come in may unpack to, all together: a limit of each alone would let an image
// multiply it by its hundreds of layers. A layer that is here already, or that another pull brings in, takes none.
type room struct {
	maxBytes, maxEntries     int64
	stream, content, entries atomic.Int64 // bytes of tar, of files with their holes, and entries, so far
}

func (s *Store) newRoom() *room {
	return &room{maxBytes: s.cfg.MaxLayerBytes, maxEntries: int64(s.cfg.MaxLayerEntries)}
}

// roomFor makes the room for those layers that are not here, and refuses what by its own account does not fit.
func (s *Store) roomFor(layers []layerWant) (*room, error) {
	r := s.newRoom()
	left := r.maxBytes
	for _, l := range layers {
		if s.index.layer(l.DiffID) != nil {
			continue
		}
		if l.Size > left {
			return nil, fmt.Errorf("layer %s: blob of %d bytes: %w", l.Digest, l.Size, tooManyBytes(r.maxBytes))
		}
		left -= max(l.Size, 0)
	}
	return r, nil
}

// share is what one layer takes of a room. It is for one goroutine.
type share struct {
	of                       *room
	stream, content, entries int64
}

// readMore counts bytes of the layer's tar.
func (s *share) readMore(n int64) error {
	s.stream += n
	if s.of.stream.Add(n) > s.of.maxBytes {
		return tooManyBytes(s.of.maxBytes)
	}
	return nil
}

// fileOf counts a file's size, holes included; one so large that the sum would overflow is not added.
func (s *share) fileOf(n int64) error {
	if n < 0 || n > s.of.maxBytes {
		return tooManyBytes(s.of.maxBytes)
	}
	s.content += n
	if s.of.content.Add(n) > s.of.maxBytes {
		return tooManyBytes(s.of.maxBytes)
	}
	return nil
}

// entriesAre sets how many entries the layer has up to now.
func (s *share) entriesAre(n int64) error {
	more := n - s.entries
	s.entries = n
	if s.of.entries.Add(more) > s.of.maxEntries {
		return tooManyEntries(s.of.maxEntries)
	}
	return nil
}

// giveBack is for a layer that failed: it may come from another place.
func (s *share) giveBack() {
	s.of.stream.Add(-s.stream)
	s.of.content.Add(-s.content)
	s.of.entries.Add(-s.entries)
	s.stream, s.content, s.entries = 0, 0, 0
}

// tooManyBytes and tooManyEntries name the setting by which a user who trusts the image lets it in.
func tooManyBytes(limit int64) error {
	return fmt.Errorf("%w: the image unpacks to more than %d bytes; where that is right, raise images.maxLayerBytes (--max-layer-bytes)", ErrRefused, limit)
}

func tooManyEntries(limit int64) error {
	return fmt.Errorf("%w: the image has more than %d entries; where that is right, raise images.maxLayerEntries (--max-layer-entries)", ErrRefused, limit)
}
