package keeper

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a handle on a process that cannot come to mean another one: a pidfd, and the start time for those
// who know processes by number.
type process struct {
	pid     int
	start   uint64
	session int // its kernel session when it was opened; 0 where that is the keeper's own
	pidfd   *os.File
}

// openProcess opens a child that nobody has reaped, so that its pid is still its own.
func openProcess(pid int) (*process, error) {
	stat, err := readProc(pid)
	if err != nil {
		return nil, err
	}
	// Non-blocking makes the descriptor pollable for os.File: Linux 5.10.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	p := &process{pid: pid, start: stat.start, session: stat.session, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	if own, err := unix.Getsid(0); err != nil || own == p.session {
		p.session = 0
	}
	return p, nil
}

// await blocks until the process has ended. It parks in the network poller and takes no status.
func (p *process) await() error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("await process %d: %w", p.pid, err)
	}
	if err := raw.Read(ended); err != nil {
		return fmt.Errorf("await process %d: %w", p.pid, err)
	}
	return nil
}

// ended tells whether the process of a pidfd is dead: pidfd_open(2), "becomes readable when the process exits".
func ended(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// signal sends sig; a process that has ended already is no error.
func (p *process) signal(sig syscall.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return nil // closed: the end has been collected
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return nil // closed meanwhile
	}
	if serr != nil && !errors.Is(serr, unix.ESRCH) {
		return fmt.Errorf("send signal %d to process %d: %w", int(sig), p.pid, serr)
	}
	return nil
}

func (p *process) close() { _ = p.pidfd.Close() } // a pidfd buffers nothing

// exitCode is the code that shells and the CRI use: 128+n for a death by signal n.
func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}
