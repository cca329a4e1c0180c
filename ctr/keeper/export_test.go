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
