package keeper

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// stdio is the keeper's side of a container's standard streams: pipes, or the master of a terminal.
type stdio struct {
	tty    *os.File // the terminal's master, nil without one
	stdout *output
	stderr *output // nil with a terminal
	log    *logFile
	once   bool // stdin closes when the first attach that had it ends

	mu    sync.Mutex
	stdin *os.File // where attach writes; nil where stdin was not asked for or is closed
}

// plumbing is what exists between the making of the streams and the start of the process: the container's ends.
type plumbing struct {
	stdio *stdio
	ends  ends // closed once the container has them
	outs  [2]*os.File
}

// newPlumbing makes the streams.
func newPlumbing(req *wire.Create, log *logFile) (_ *plumbing, err error) {
	pl := &plumbing{stdio: &stdio{log: log, once: req.StdinOnce}, ends: ends{tty: req.TTY}}
	if req.TTY {
		return pl, nil
	}
	defer func() {
		if err != nil {
			pl.abandon()
		}
	}()
	if req.Stdin {
		if pl.ends.stdin, pl.stdio.stdin, err = pipe(theyRead); err != nil {
			return nil, err
		}
	}
	if pl.outs[0], pl.ends.stdout, err = pipe(theyWrite); err != nil {
		return nil, err
	}
	if pl.outs[1], pl.ends.stderr, err = pipe(theyWrite); err != nil {
		return nil, err
	}
	pl.ends.said = pl.outs[1]
	return pl, nil
}

// connect runs after the process has started: it starts to copy. It closes the container's ends, whose last holders
// are then the container's processes.
func (pl *plumbing) connect(req *wire.Create, tty *os.File) *stdio {
	s := pl.stdio
	if req.TTY {
		s.tty = tty
		if req.Stdin {
			s.stdin = tty
		}
		s.stdout = newOutput(tty, "stdout", s.log)
	} else {
		s.stdout, s.stderr = newOutput(pl.outs[0], "stdout", s.log), newOutput(pl.outs[1], "stderr", s.log)
		pl.outs = [2]*os.File{}
	}
	s.run()
	pl.stdio = nil
	pl.abandon()
	return s
}

// abandon closes whatever nobody has taken over.
func (pl *plumbing) abandon() {
	pl.ends.close()
	wire.CloseFiles(pl.outs[:])
	if pl.stdio != nil {
		wire.CloseFiles([]*os.File{pl.stdio.stdin})
	}
}

// run starts to copy; the goroutines end with close.
func (s *stdio) run() {
	for _, o := range s.outputs() {
		if !o.finished { // under an earlier keeper
			go o.run()
		}
	}
}

// outputs returns the streams that the container writes.
func (s *stdio) outputs() []*output {
	if s.stderr == nil {
		return []*output{s.stdout}
	}
	return []*output{s.stdout, s.stderr}
}

// openStdin returns a descriptor of the container's stdin for one attach, which may be cut off without harm to
// the others; nil where there is no open stdin.
func (s *stdio) openStdin() (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin == nil {
		return nil, nil
	}
	return pollable(s.stdin)
}

// closeStdin makes the container read the end of its input, once all attached writers are gone too. A terminal
// has no such end; there it only keeps later attaches from writing.
func (s *stdio) closeStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin != nil && s.stdin != s.tty {
		_ = s.stdin.Close() // a pipe: written is sent
	}
	s.stdin = nil
}

func (s *stdio) resize(size wire.Size) error {
	if s.tty == nil {
		return fmt.Errorf("resize terminal: the container has none: %w", wire.ErrBadRequest)
	}
	return control(s.tty, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
}

// close gives all streams up and waits for the copying to end.
func (s *stdio) close() {
	s.closeStdin()
	for _, o := range s.outputs() {
		o.close()
	}
	s.log.close()
}

type direction bool

const (
	theyRead  direction = false
	theyWrite direction = true
)

// pipe makes a pipe whose container end blocks, as programs expect of their standard streams, and whose end here
// is pollable: the flag belongs to each end, not to the pipe.
func pipe(d direction) (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	ours := fds[1]
	if d == theyWrite {
		ours = fds[0]
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make pipe pollable: %w", err), unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// consolePair makes the socket over which a container's init sends its terminal's master.
func consolePair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make console socket: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console"), nil
}

// receiveConsole takes the master that is queued on the socket, since the process has started.
func receiveConsole(socket *os.File) (tty *os.File, err error) {
	name, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	err = control(socket, func(fd int) error {
		_, n, _, _, err := unix.Recvmsg(fd, name, rights, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		if err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(rights[:n])
		if err != nil || len(messages) != 1 {
			return errors.Join(errors.New("no control message"), err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(fds) != 1 {
			return errors.Join(errors.New("no descriptor"), err)
		}
		if err := unix.SetNonblock(fds[0], true); err != nil {
			return errors.Join(err, unix.Close(fds[0]))
		}
		tty = os.NewFile(uintptr(fds[0]), "ptmx")
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	return tty, nil
}

// pollable duplicates f into a file that Go's poller can wait for and that can be closed by itself. The mode is
// shared with everybody who has the same open file: for ends of which the keeper is the only holder.
func pollable(f *os.File) (dup *os.File, err error) {
	err = control(f, func(fd int) error {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return err
		}
		if err := unix.SetNonblock(n, true); err != nil {
			return errors.Join(err, unix.Close(n))
		}
		dup = os.NewFile(uintptr(n), f.Name())
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor: %w", err)
	}
	return dup, nil
}

// control runs do with f's descriptor and leaves its blocking mode alone, unlike Fd.
func control(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var derr error
	if err := raw.Control(func(fd uintptr) { derr = do(int(fd)) }); err != nil {
		return err
	}
	return derr
}
