package streaming

import (
	"fmt"
	"runtime/debug"
)

// Defect is a panic that one session had, as an error: it ends that session and nothing else.
type Defect struct {
	Reason any
	Stack  []byte // for the log
}

func (d *Defect) Error() string {
	return fmt.Sprintf("the daemon has a defect (%v); its log has the stack", d.Reason)
}

// Guard calls fn and returns its error, a *Defect where it panics. A goroutine that serves one client begins with it:
// a panic that nobody recovers ends the daemon, and with it every other client's streams.
func Guard(fn func() error) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = &Defect{reason, debug.Stack()}
		}
	}()
	return fn()
}
