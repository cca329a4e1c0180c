package keeper

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"
)

// servingKeeper accepts calls, and has one container that writes.
func servingKeeper(t *testing.T) (*Keeper, *output) {
	t.Helper()
	k := newKeeper(Config{RuntimeDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err := k.listen(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); k.serve() }()
	t.Cleanup(func() {
		_ = k.listener.Close()
		<-done
	})
	c := newContainer(k, "c1")
	c.stdio = &stdio{stdout: newOutput(nil, "stdout", nil), stderr: newOutput(nil, "stderr", nil)}
	k.containers[c.id] = c
	return k, c.stdio.stderr
}

// TestAFreezeIsGivenUpWhereALogHangs: a write to a log that does not come back must not hold up the whole node for ever,
// and what waited for it takes nothing along.
func TestAFreezeIsGivenUpWhereALogHangs(t *testing.T) {
	k, hangs := servingKeeper(t)
	hangs.passing.Lock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := k.freeze(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it hangs: %v", err)
	}
	k.swap.calls.enter() // open again
	k.swap.calls.leave()
	hangs.passing.Unlock()
	thaw, err := k.freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if hangs.passing.TryLock() {
		t.Error("it is not held while everything is frozen")
	}
	if err := thaw(); err != nil {
		t.Error(err)
	}
	hangs.passing.Lock() // nobody has it
	defer hangs.passing.Unlock()
}

// TestTheEndOfTheNodeEndsAFreeze that waits for a call: the node is not kept up by its own replacement.
func TestTheEndOfTheNodeEndsAFreeze(t *testing.T) {
	k, _ := servingKeeper(t)
	k.swap.calls.enter()
	defer k.swap.calls.leave()
	frozen := make(chan error, 1)
	go func() { _, err := k.freeze(context.Background()); frozen <- err }()
	k.stop()
	if err := <-frozen; !errors.Is(err, errStopping) {
		t.Errorf("it ended with %v", err)
	}
}
