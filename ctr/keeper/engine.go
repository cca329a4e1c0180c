package keeper

import (
	"errors"
	"os"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// engine makes the processes of one container. There are two: libcontainer in the keeper itself (inProcess), and an
// OCI runtime program that is run once for each step (program). All that comes after a process is made is the
// keeper's own and the same for both: streams, logs, waiting, signals, records.
type engine interface {
	// create makes the init process, which waits before the container's program. It is called once, while the reaper
	// of orphans is held off. On an error no process is left.
	create(ends) (child, error)
	// start lets the program run. dead is closed at the end of the init process, which also ends a start that waits.
	start(dead <-chan struct{}) error
	// exec runs a process in a container that has been started; several at once. The reaper is held off here too. On an
	// error the process may be left; the caller ends it (endStrays).
	exec(execution) (child, error)
	// update puts other limits on the container's cgroup. On an error some may be in force; the caller has what was.
	update(*specs.LinuxResources) error
	// destroy takes away what there is of the container beside processes. Idempotent.
	destroy() error
}

// newEngine prepares a container; no process exists yet.
func (k *Keeper) newEngine(id string, req *wire.Create) (engine, error) {
	if req.Runtime != nil {
		return newProgram(k, id, req)
	}
	return newInProcess(k, id, req.Spec)
}

// ends are what a process gets as its standard streams: a terminal, or these files, of which nil is /dev/null.
type ends struct {
	stdStreams
	tty bool
	// said is the keeper's end of stderr, where it has one: what a runtime program wrote there before it failed.
	said *os.File
}

// execution is one process to run in a container.
type execution struct {
	process *specs.Process
	ends    ends
	// cgroup is the directory below the container's that is made for the process; "" where there is none.
	cgroup string
}

// child is a process that an engine has made and that the keeper alone waits for.
type child struct {
	pid int
	// collect takes the status of the dead process.
	collect func() (code int, err error)
	// tty is the terminal's master, nil without a terminal.
	tty *os.File
	// inside is the process's pid in a sandbox, for a runtime program that tells it; else 0.
	inside int
	// signal reaches the processes for which this one only stands, as they live in a sandbox; nil where it is itself
	// what runs.
	signal func(sig syscall.Signal, all bool) error
}

// abort ends a child that is of no use. It is not reaped yet, so that the pid is its own.
func (c child) abort() error {
	_ = unix.Kill(c.pid, unix.SIGKILL)
	_, err := c.collect()
	wire.CloseFiles([]*os.File{c.tty})
	return err
}

// waitPid is collect for a child that is known by its pid alone.
func waitPid(pid int) func() (int, error) {
	wait := waitStatus(pid)
	return func() (int, error) {
		status, err := wait()
		if err != nil {
			return lostExitCode, err
		}
		return exitCode(status), nil
	}
}

// waitStatus takes the status of a child that is known by its pid alone.
func waitStatus(pid int) func() (syscall.WaitStatus, error) {
	return func() (syscall.WaitStatus, error) {
		var status syscall.WaitStatus
		for {
			_, err := syscall.Wait4(pid, &status, 0, nil)
			if !errors.Is(err, unix.EINTR) {
				return status, err
			}
		}
	}
}
