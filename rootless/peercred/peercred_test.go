package peercred

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestUID(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	if uid, err := UID(conn); err != nil || uid != uint32(os.Geteuid()) {
		t.Errorf("uid %d, %v; this process is of %d", uid, err, os.Geteuid())
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if uid, err := UID(conn); !errors.Is(err, net.ErrClosed) {
		t.Errorf("of a closed connection: uid %d, %v", uid, err)
	}
}
