package images

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
)

// index is what the store has, in memory. Records in it are never changed, only replaced.
type index struct {
	mu     sync.RWMutex
	images map[string]*imageRecord  // by id
	names  map[string]string        // canonical name by tag or digest → id
	layers map[string]*layerRecord  // by diffID
	mounts map[string]*rootfsRecord // by "rootfs/ID" or "volumes/ID"
	pins   map[string]int           // diffIDs that a running pull or mount is about to need
}

func newIndex() *index {
	return &index{images: map[string]*imageRecord{}, names: map[string]string{}, layers: map[string]*layerRecord{},
		mounts: map[string]*rootfsRecord{}, pins: map[string]int{}}
}

// find resolves what a CRI client may call an image: its id, a name by tag or digest, or the beginning of the id.
// A name wins over an id prefix, so that an image called "cafe" is found by its name.
func (x *index) find(s string) (*imageRecord, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if r := x.images[s]; r != nil {
		return r, nil
	}
	ref, refErr := parseReference(s)
	if refErr == nil {
		if id, ok := x.names[ref.String()]; ok {
			return x.images[id], nil
		}
	}
	prefix, ok := idPrefix(s)
	if !ok {
		if refErr != nil {
			return nil, refErr
		}
		return nil, fmt.Errorf("image %s: %w", s, ErrNotFound)
	}
	var found *imageRecord
	for id, r := range x.images {
		if !strings.HasPrefix(idHex(id), prefix) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("%w: image id %s: more than one image begins so", ErrInvalid, s)
		}
		found = r
	}
	if found == nil {
		return nil, fmt.Errorf("image %s: %w", s, ErrNotFound)
	}
	return found, nil
}

func (x *index) list() []*imageRecord {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return slices.SortedFunc(maps.Values(x.images), func(a, b *imageRecord) int { return cmp.Compare(a.ID, b.ID) })
}

// image returns the record of id, nil where there is none.
func (x *index) image(id string) *imageRecord {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.images[id]
}

// holders returns the ids of the images that now have one of names.
func (x *index) holders(names []string) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var ids []string
	for _, n := range names {
		if id, ok := x.names[n]; ok && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// putImage publishes r in place of the record with its id. Its names point to it from now on.
func (x *index) putImage(r *imageRecord) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.forgetNamesLocked(r.ID)
	x.images[r.ID] = r
	for tag := range r.Tags {
		x.names[tag] = r.ID
	}
	for _, d := range r.Digests {
		x.names[d] = r.ID
	}
}

func (x *index) dropImage(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.forgetNamesLocked(id)
	delete(x.images, id)
}

func (x *index) forgetNamesLocked(id string) {
	maps.DeleteFunc(x.names, func(_, owner string) bool { return owner == id })
}

func (x *index) layer(diffID string) *layerRecord {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.layers[diffID]
}

// replaceLayer publishes a new record of a layer that is still there, once place has put it where it belongs. place only
// renames: a layer that goes must not get a record again.
func (x *index) replaceLayer(old, r *layerRecord, place func() error) (replaced bool, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.layers[r.DiffID] != old {
		return false, nil
	}
	if err := place(); err != nil {
		return false, err
	}
	x.layers[r.DiffID] = r
	return true, nil
}

// addLayer publishes r once place has put its directory where it belongs. place only renames: no garbage
// collection may come between it and the index. A layer that is there already is left as it is.
func (x *index) addLayer(r *layerRecord, place func() error) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.layers[r.DiffID] != nil {
		return nil
	}
	if err := place(); err != nil {
		return err
	}
	x.layers[r.DiffID] = r
	return nil
}

// pin keeps layers from being collected until the returned function is called; they need not be there yet.
func (x *index) pin(diffIDs []string) (unpin func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, d := range diffIDs {
		x.pins[d]++
	}
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		for _, d := range diffIDs {
			if x.pins[d]--; x.pins[d] <= 0 {
				delete(x.pins, d)
			}
		}
	}
}

func (x *index) mount(key string) *rootfsRecord {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.mounts[key]
}

func (x *index) putMount(key string, r *rootfsRecord) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mounts[key] = r
}

func (x *index) dropMount(key string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.mounts, key)
}

// mountKeys returns the keys of the mounts of one kind ("rootfs", "volumes"), sorted.
func (x *index) mountKeys(kind string) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var keys []string
	for key := range x.mounts {
		if strings.HasPrefix(key, kind+"/") {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// collect takes every layer that nothing needs out of the index, and hands its directory to remove, which only renames, or
// takes the record away: a pull that wants the layer again finds either all of it or nothing that counts. One that cannot
// be taken away is whole, and stays.
func (x *index) collect(remove func(diffID string) error) (err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.anyUnknownLocked() {
		return nil // until that container is gone
	}
	used := map[string]bool{}
	for d := range x.pins {
		used[d] = true
	}
	for _, r := range x.images {
		for _, d := range r.Layers {
			used[d] = true
		}
	}
	for _, r := range x.mounts {
		for _, d := range r.Layers {
			used[d] = true
		}
	}
	for d := range x.layers {
		if used[d] {
			continue
		}
		if failed := remove(d); failed != nil {
			err = errors.Join(err, failed)
			continue
		}
		delete(x.layers, d)
	}
	return err
}

// collectFix calls remove, which only renames, unless the fix directory of image id is needed: by the image, by a
// mount made from it, or by a pull that is about to end.
func (x *index) collectFix(id string, remove func() error) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if r := x.images[id]; r != nil && r.Fix || x.pins[fixPin(id)] > 0 || x.anyUnknownLocked() {
		return nil
	}
	for _, m := range x.mounts {
		if m.Image == id && m.Fix {
			return nil
		}
	}
	return remove()
}

// mountNeeds tells whether a mount has, or may have, the layer whose directory has that name.
func (x *index) mountNeeds(dir string) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, m := range x.mounts {
		if m.unknown || slices.ContainsFunc(m.Layers, func(d string) bool { return dirName(d) == dir }) {
			return true
		}
	}
	return false
}

// anyUnknownLocked tells whether there is a mount of which nobody knows what it needs.
func (x *index) anyUnknownLocked() bool {
	for _, m := range x.mounts {
		if m.unknown {
			return true
		}
	}
	return false
}

// fixPin is the pin that keeps an image's fix directory.
func fixPin(id string) string { return "fix/" + id }

// usage sums up the layers.
func (x *index) usage() (bytes, inodes uint64) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, l := range x.layers {
		bytes += l.Bytes
		inodes += l.Inodes
	}
	return bytes, inodes
}

// counts of what there is, for people.
func (x *index) counts() (images, layers, mounts int) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.images), len(x.layers), len(x.mounts)
}

// unsynced returns the layers that may not be on stable storage yet.
func (x *index) unsynced() []*layerRecord {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var out []*layerRecord
	for _, l := range x.layers {
		if !l.Synced {
			out = append(out, l)
		}
	}
	return out
}
