package images

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
)

// errDefect is what a panic becomes for the call that had it.
var errDefect = errors.New("the daemon has a defect")

// guarded calls fn and returns its error, errDefect where it panics. A goroutine that works for a call begins with it, as the
// server does for the call's own: a panic that nobody recovers ends the daemon, and with it every other call. What the
// libraries start by themselves to decompress cannot be guarded; of ours, they run no more than verifier.Read.
func guarded(log *slog.Logger, fn func() error) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			log.Error("panic", "reason", reason, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w (%v); its log has the stack", errDefect, reason)
		}
	}()
	return fn()
}
