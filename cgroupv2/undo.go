package cgroupv2

import "errors"

// undo is a stack of what must be taken back when a later step fails.
type undo []func() error

func (u *undo) push(step func() error) { *u = append(*u, step) }

// run takes everything back, last in, first out, and joins what went wrong to the error that caused it.
func (u undo) run(cause error) error {
	errs := []error{cause}
	for i := len(u) - 1; i >= 0; i-- {
		errs = append(errs, u[i]())
	}
	return errors.Join(errs...)
}
