package pod

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// outputGrace is how long output is still read after a process has ended: processes that it left behind may
// hold the pipe open for ever, and are not what was asked for.
const outputGrace = 200 * time.Millisecond

// pipeSize is what a pipe holds, and busySize what that of a process with much output gets to hold: each time that a
// pipe is full its writer is put to sleep and woken up again. Not from the start: the kernel gives the pages of all pipes
// of a user only up to a limit, and those made beyond it hold next to nothing (pipe(7), pipe-user-pages-soft).
const (
	pipeSize = 64 << 10
	busySize = 256 << 10
)

// newPipe makes a pipe for a process of a container. Only our end is non-blocking (and so can be interrupted):
// programs do not expect EAGAIN from their standard streams.
func newPipe(weRead bool) (ours, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	our, their := fds[1], fds[0]
	if weRead {
		our, their = fds[0], fds[1]
	}
	if err := unix.SetNonblock(our, true); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make pipe: %w", err), unix.Close(our), unix.Close(their))
	}
	return os.NewFile(uintptr(our), "pipe"), os.NewFile(uintptr(their), "pipe"), nil
}

// interruptible returns a second descriptor of a terminal, on which deadlines work.
func interruptible(f *os.File) (*os.File, error) {
	var fd int
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	var dupErr error
	err = raw.Control(func(old uintptr) {
		if fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); dupErr == nil {
			dupErr = unix.SetNonblock(fd, true)
		}
	})
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	return os.NewFile(uintptr(fd), "terminal"), nil
}

// copyOutput copies r to w until the end, or until the deadline that the process's exit sets on r. What the
// process wrote before it ended is copied in any case, however slow w is.
func copyOutput(w io.Writer, r *os.File) error {
	err := copyToEnd(w, r)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = copyRest(w, r)
	}
	if errors.Is(err, unix.EIO) {
		return nil // a terminal whose other end is closed
	}
	return err
}

// copyToEnd is io.Copy, with a buffer that holds what the pipe does. A read that fills it finds a busy writer.
func copyToEnd(w io.Writer, r *os.File) error {
	buf := make([]byte, pipeSize)
	for widened := false; ; {
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if n == pipeSize && !widened {
			widened = true
			if widen(r) == nil { // else it stays as it is: a terminal, or a user with many pipes
				buf = make([]byte, busySize)
			}
		}
	}
}

// widen lets a pipe hold busySize.
func widen(pipe *os.File) error {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) { _, setErr = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, busySize) })
	return errors.Join(err, setErr)
}

// copyRest copies what is in the pipe now, without waiting for more.
func copyRest(w io.Writer, r *os.File) error {
	if err := r.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	raw, err := r.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, pipeSize)
	for {
		var n int
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			n, readErr = unix.Read(int(fd), buf)
			return true // whatever came: never wait
		})
		switch {
		case err != nil:
			return err
		case errors.Is(readErr, unix.EINTR):
			continue
		case errors.Is(readErr, unix.EAGAIN), readErr == nil && n == 0:
			return nil
		case readErr != nil:
			return readErr
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// cappedBuffer keeps the first max bytes and swallows the rest: "the remaining output should be discarded, and
// the command should proceed with no error".
type cappedBuffer struct {
	kept bytes.Buffer // not embedded: its ReadFrom would let io.Copy pass Write by
	max  int
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), b.max-b.kept.Len())]) // never fails
	return len(p), nil
}

func closeFiles(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
