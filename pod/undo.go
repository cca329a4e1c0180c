package pod

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// undoTimeout bounds the whole of a roll-back. It is detached from the caller, whose deadline may be the very
// reason for it.
const undoTimeout = 30 * time.Second

// undo is a stack of what gives back what an operation has acquired. Push right after acquiring; steps that
// run side by side may push at the same time.
type undo struct {
	mu    sync.Mutex
	steps []undoStep
}

type undoStep struct {
	name string
	run  func(context.Context) error
}

func (u *undo) push(name string, run func(context.Context) error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.steps = append(u.steps, undoStep{name, run})
}

// run gives everything back, last in first out. A step that fails does not keep the others from running.
func (u *undo) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	u.mu.Lock()
	defer u.mu.Unlock()
	var errs []error
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i].run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", u.steps[i].name, err))
		}
	}
	u.steps = nil
	return errors.Join(errs...)
}
