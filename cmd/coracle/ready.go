package main

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// readiness tells the keeper that the daemon serves, or why it does not: one line, once.
type readiness struct{ file *os.File }

// newReadiness takes the descriptor that the keeper has given; nobody else is to have it.
func newReadiness() *readiness {
	fd, err := strconv.Atoi(os.Getenv(ctr.ReadyEnv))
	_ = os.Unsetenv(ctr.ReadyEnv) // the name is valid
	if err != nil || fd < 3 {
		return &readiness{} // not started by a keeper
	}
	unix.CloseOnExec(fd)
	return &readiness{file: os.NewFile(uintptr(fd), "ready")}
}

// tell says that the daemon serves, where err is nil. A keeper that does not listen any more is none of our business.
func (r *readiness) tell(err error) {
	if r.file == nil {
		return
	}
	line := ctr.ReadyServing
	if err != nil {
		line = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	_, _ = r.file.WriteString(line + "\n")
	_ = r.file.Close()
	r.file = nil
}
