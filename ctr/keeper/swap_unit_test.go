package keeper

import (
	"context"
	"errors"
	"log/slog"
	"sync"
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

// TestAFreezeIsGivenUpWhereAWriteHangs: a write to a log, or of a record, that does not come back must not hold up the whole
// node for ever, and what waited for it takes nothing along.
func TestAFreezeIsGivenUpWhereAWriteHangs(t *testing.T) {
	k, stderr := servingKeeper(t)
	for what, mu := range map[string]*sync.Mutex{"log": &stderr.passing, "record": &k.containers["c1"].record} {
		t.Run(what, func(t *testing.T) { freezeAround(t, k, mu) })
	}
}

// freezeAround freezes while somebody holds mu, in vain, and after that.
func freezeAround(t *testing.T, k *Keeper, mu *sync.Mutex) {
	mu.Lock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	thaw, err := k.freeze(ctx)
	if err == nil {
		err = thaw()
		t.Errorf("it did not wait; thawed: %v", err)
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it hangs: %v", err)
	}
	k.swap.calls.enter() // open again
	k.swap.calls.leave()
	mu.Unlock()
	thaw, err = k.freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if mu.TryLock() {
		t.Error("it is not held while everything is frozen")
	}
	if err := thaw(); err != nil {
		t.Error(err)
	}
	mu.Lock() // nobody has it
	defer mu.Unlock()
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
