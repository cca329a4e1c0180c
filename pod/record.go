package pod

import (
	"errors"
	"reflect"
	"sync"
	"sync/atomic"
)

// A record is the status of one object. Readers take a snapshot and wait for nobody.
type record[T any] struct {
	mu   sync.Mutex // one transition at a time
	cur  atomic.Pointer[T]
	path string
	also func(T) error // another place where a change is written; nil for none
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

// transition is the way to a status that an operation has brought about: it is on disk before it is seen. Where
// the disk refuses, the old status stands, and the operation is undone.
func (r *record[T]) transition(change func(*T)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next, err := r.write(change)
	if err == nil {
		r.cur.Store(&next)
	}
	return err
}

// fact takes in what nobody can undo: that a process runs or has ended, that something was given back. It is seen
// even where the disk refuses it; the error only says that it is not on disk. A full runtime directory must not
// turn the dead into the living, whom nobody could stop or remove, and a daemon that comes back asks the keeper.
func (r *record[T]) fact(change func(*T)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next, err := r.write(change)
	r.cur.Store(&next)
	return err
}

// write is called with mu held.
func (r *record[T]) write(change func(*T)) (T, error) {
	next := *r.cur.Load()
	change(&next)
	if reflect.DeepEqual(next, *r.cur.Load()) {
		return next, nil // a fact that came twice
	}
	err := saveStatus(r.path, next)
	if r.also != nil {
		err = errors.Join(err, r.also(next))
	}
	return next, err
}
