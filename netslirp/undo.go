package netslirp

import (
	"context"
	"errors"
	"slices"
	"time"
)

// undoTimeout bounds what an undo may wait for: it runs although the caller's context may have ended.
const undoTimeout = 5 * time.Second

// undo is a last-in-first-out stack of what to take back.
type undo struct {
	steps []func(context.Context) error
}

func (u *undo) push(step func(context.Context) error) { u.steps = append(u.steps, step) }

// run takes back every step, whatever fails, with a deadline of its own.
func (u *undo) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var errs []error
	for _, step := range slices.Backward(u.steps) {
		errs = append(errs, step(ctx))
	}
	u.steps = nil
	return errors.Join(errs...)
}
