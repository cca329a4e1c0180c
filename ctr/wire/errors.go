package wire

import (
	"errors"
	"strings"
	"syscall"
)

// Sentinels that survive the wire: errors.Is works on both sides.
var (
	ErrNotFound   = errors.New("no such container")
	ErrNotRunning = errors.New("container is not running")
	ErrExists     = errors.New("container exists already")
	ErrBadRequest = errors.New("bad request")
	// ErrLogReplaced: a container has put something else in the place of its log, or of the directory that it lies in.
	ErrLogReplaced = errors.New("the container's log has been replaced")
)

// kinds are the errors that the other side can tell apart. The kernel's, that there is no room, is acted on by callers of
// the CRI.
var kinds = map[string]error{
	"no-space":     syscall.ENOSPC,
	"no-quota":     syscall.EDQUOT,
	"not-found":    ErrNotFound,
	"not-running":  ErrNotRunning,
	"exists":       ErrExists,
	"bad-request":  ErrBadRequest,
	"log-replaced": ErrLogReplaced,
}

// Error is an error on its way to the caller.
type Error struct {
	Kind    string `json:"kind,omitempty"`
	Message string `json:"message"`
}

// ToError packs err for the wire; nil stays nil.
func ToError(err error) *Error {
	if err == nil {
		return nil
	}
	e := &Error{Message: strings.TrimSpace(err.Error())}
	for kind, sentinel := range kinds {
		if errors.Is(err, sentinel) {
			e.Kind = kind
		}
	}
	return e
}

// Error returns the sentence that the keeper wrote.
func (e *Error) Error() string { return e.Message }

// Unwrap gives the sentinel that the keeper's error wrapped, if any.
func (e *Error) Unwrap() error { return kinds[e.Kind] }
