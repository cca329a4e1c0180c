package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/peercred"
)

const (
	// maxFrame bounds what one side can make the other allocate. A spec with a full seccomp profile is 100 KiB.
	maxFrame = 8 << 20
	// maxFiles is stdin, stdout and stderr.
	maxFiles = 3

	headerSize = 4
)

// Conn carries one call. Reads and writes may run at once, each from one goroutine; Close may be called at any time.
type Conn struct {
	unix *net.UnixConn
}

// NewConn makes a Conn of a stream socket.
func NewConn(c *net.UnixConn) *Conn { return &Conn{unix: c} }

// ConnOf makes a Conn of a stream socket's descriptor, which it duplicates: f stays the caller's.
func ConnOf(f *os.File) (*Conn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("take over connection: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("take over connection: %s is no unix socket", c.LocalAddr().Network()), c.Close())
	}
	return NewConn(u), nil
}

// SyscallConn gives access to the descriptor.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return c.unix.SyscallConn() }

// Close ends the call.
func (c *Conn) Close() error { return c.unix.Close() }

// CloseWrite tells the peer that this side gives the call up, and still lets its last reply come.
func (c *Conn) CloseWrite() error { return c.unix.CloseWrite() }

// SetReadDeadline bounds Read and AwaitClose; the zero time bounds nothing.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.unix.SetReadDeadline(t) }

// SetWriteDeadline bounds Write; the zero time bounds nothing.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.unix.SetWriteDeadline(t) }

// Write sends v as one frame, and duplicates of files with it. The caller still owns files.
func (c *Conn) Write(v any, files ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode frame: %w", err)
	}
	if len(body) > maxFrame {
		return fmt.Errorf("send frame: %d bytes are more than %d: %w", len(body), maxFrame, ErrBadRequest)
	}
	frame := append(binary.BigEndian.AppendUint32(make([]byte, 0, headerSize+len(body)), uint32(len(body))), body...)
	n, err := c.writeFirst(frame, files)
	if err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	// A stream socket may take less than it was given; the descriptors went with the first byte.
	if n < len(frame) {
		if _, err := c.unix.Write(frame[n:]); err != nil {
			return fmt.Errorf("send frame: %w", err)
		}
	}
	return nil
}

func (c *Conn) writeFirst(frame []byte, files []*os.File) (int, error) {
	if len(files) == 0 {
		return c.unix.Write(frame)
	}
	// SyscallConn instead of Fd: Fd would make the descriptor blocking, for everybody who shares it.
	var fds []int
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return 0, err
		}
		if err := raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return 0, err
		}
	}
	n, _, err := c.unix.WriteMsgUnix(frame, unix.UnixRights(fds...), nil)
	return n, err
}

// Read receives one frame into v, and the descriptors that came with it, close-on-exec and in whatever blocking
// mode the sender left them. io.EOF means that the peer closed between frames.
func (c *Conn) Read(v any) ([]*os.File, error) {
	header := make([]byte, headerSize)
	control := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.unix.ReadMsgUnix(header, control)
	files, ferr := filesOf(control[:oobn])
	if err == nil && ferr == nil && flags&unix.MSG_CTRUNC != 0 {
		ferr = fmt.Errorf("receive frame: more than %d descriptors: %w", maxFiles, ErrBadRequest)
	}
	if err == nil {
		err = ferr
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil {
		err = c.readBody(header, n, v)
	}
	if err != nil {
		CloseFiles(files)
		return nil, err
	}
	return files, nil
}

func (c *Conn) readBody(header []byte, got int, v any) error {
	if _, err := io.ReadFull(c.unix, header[got:]); err != nil {
		return fmt.Errorf("receive frame: %w", errors.Join(err, ErrBadRequest))
	}
	size := binary.BigEndian.Uint32(header)
	if size > maxFrame {
		return fmt.Errorf("receive frame: %d bytes are more than %d: %w", size, maxFrame, ErrBadRequest)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c.unix, body); err != nil {
		return fmt.Errorf("receive frame: %w", errors.Join(err, ErrBadRequest))
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode frame: %w", errors.Join(err, ErrBadRequest))
	}
	return nil
}

// AwaitClose blocks until the peer closes, sends what the protocol has no place for, or this side is closed.
func (c *Conn) AwaitClose() {
	var one [1]byte
	_, _ = c.unix.Read(one[:]) // whatever comes, the call is over
}

// PeerUID returns the peer's effective user id when it connected, as this user namespace sees it.
func (c *Conn) PeerUID() (uint32, error) { return peercred.UID(c.unix) }

func filesOf(control []byte) ([]*os.File, error) {
	if len(control) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // no descriptors in this one
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("passed-%d", fd)))
		}
	}
	return files, nil
}

// CloseFiles closes all of files; nils are skipped.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close() // nothing is buffered in these
		}
	}
}
