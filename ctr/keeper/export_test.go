package keeper

import (
	"context"
	"testing"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// SetPanicHandler adds a call that panics, for the duration of the test.
func SetPanicHandler(t *testing.T, op wire.Op) {
	handlers[op] = func(*call, context.Context) (wire.Reply, error) { panic("on purpose") }
	t.Cleanup(func() { delete(handlers, op) })
}

// KeptFilters counts the seccomp profiles whose filters are kept.
func (k *Keeper) KeptFilters() (kept int) {
	k.filters.mu.Lock()
	defer k.filters.mu.Unlock()
	for _, file := range k.filters.kept {
		if file != nil {
			kept++
		}
	}
	return kept
}

// BornInItsCgroup tells whether a container's init was made by birth.
func (k *Keeper) BornInItsCgroup(id string) bool {
	c, err := k.lookup(context.Background(), id)
	if err != nil {
		return false
	}
	e, inProcess := c.engine.(*inProcess)
	return inProcess && e.born != nil
}
