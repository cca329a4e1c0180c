package pod

import (
	"reflect"
	"sync"
	"sync/atomic"
)

// A record is the status of one object. Readers take a snapshot and wait for nobody.
type record[T any] struct {
	mu   sync.Mutex // one transition at a time
	cur  atomic.Pointer[T]
	path string
}

func newRecord[T any](path string, first T) *record[T] {
	r := &record[T]{path: path}
	r.cur.Store(&first)
	return r
}

// snapshot returns a copy. Slices in it are never written to.
func (r *record[T]) snapshot() T { return *r.cur.Load() }

// save writes the first status of an object.
func (r *record[T]) save() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return saveStatus(r.path, *r.cur.Load())
}

// transition is the only way to a new status: it is on disk before it is seen. Where the disk refuses, the old
// status stands.
func (r *record[T]) transition(change func(*T)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := *r.cur.Load()
	change(&next)
	if reflect.DeepEqual(next, *r.cur.Load()) {
		return nil // a fact that came twice
	}
	if err := saveStatus(r.path, next); err != nil {
		return err
	}
	r.cur.Store(&next)
	return nil
}
