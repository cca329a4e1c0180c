//go:build !cgo || !seccomp

package filters

import (
	"errors"
	"io"
	"os"
)

// Fd is where a kept filter would be.
const Fd = 3

var errWithout = errors.New("built without seccomp")

// New fails: there is nothing to keep in a build without seccomp.
func New() (*os.File, error) { return nil, errWithout }

// Seal fails.
func Seal(*os.File) error { return errWithout }

// Use does nothing.
func Use() {}

// Record fails.
func Record(io.Reader) error { return errWithout }
