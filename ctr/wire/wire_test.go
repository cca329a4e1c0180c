package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	v, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	a, b = NewConn(u), NewConn(v)
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a, b
}

func TestFramesAndDescriptorsArriveTogether(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	sent := make(chan error, 1)
	go func() {
		// The first is larger than any socket buffer; each has its own descriptors.
		sent <- errors.Join(a.Write(Request{Op: OpExec, ID: strings.Repeat("x", 4<<20)}, w, w),
			a.Write(Request{Op: OpList}), a.Write(Request{Op: OpAttach}, w), w.Close(), a.Close())
	}()
	for i, want := range []struct{ size, files int }{{4 << 20, 2}, {0, 0}, {0, 1}} {
		var req Request
		files, err := b.Read(&req)
		if err != nil || len(req.ID) != want.size || len(files) != want.files {
			t.Fatalf("frame %d: %d bytes, %d files, %v", i, len(req.ID), len(files), err)
		}
		for _, f := range files {
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("frame %d: a descriptor would leak into children: %v", i, err)
			}
			if _, err := f.WriteString("!"); err != nil {
				t.Error(err)
			}
		}
		CloseFiles(files)
	}
	if _, err := b.Read(&Request{}); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(r); string(got) != "!!!" || err != nil {
		t.Errorf("through the descriptors: %q, %v", got, err)
	}
}

func TestFramesThatAreTooLargeAreNotSent(t *testing.T) {
	a, _ := pair(t)
	if err := a.Write(Request{ID: strings.Repeat("x", maxFrame)}); !errors.Is(err, ErrBadRequest) {
		t.Errorf("write: %v", err)
	}
}

func TestSentinelsCrossTheWire(t *testing.T) {
	for _, sentinel := range []error{ErrNotFound, ErrNotRunning, ErrExists, ErrBadRequest} {
		a, b := pair(t)
		if err := a.Write(Reply{Error: ToError(fmt.Errorf("kill c1: %w", sentinel))}); err != nil {
			t.Fatal(err)
		}
		var reply Reply
		if _, err := b.Read(&reply); err != nil {
			t.Fatal(err)
		}
		if !errors.Is(reply.Error, sentinel) || reply.Error.Error() != "kill c1: "+sentinel.Error() {
			t.Errorf("%v has become %v", sentinel, reply.Error)
		}
	}
	if ToError(nil) != nil {
		t.Error("nil has become an error")
	}
	if err := ToError(errors.New("other")); errors.Unwrap(err) != nil {
		t.Error("an error without a sentinel wraps one")
	}
}

func TestPeerIsThisUser(t *testing.T) {
	a, _ := pair(t)
	if uid, err := a.PeerUID(); err != nil || uid != uint32(os.Geteuid()) {
		t.Errorf("peer %d, %v", uid, err)
	}
}
