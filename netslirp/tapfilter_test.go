package netslirp

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wantFiltered is called in a node of rootlesskit's: what a socket sends by the TAP device alone arrives at the host's
// address, and at its loopback not, though slirp4netns would bring it there.
func wantFiltered(t *testing.T, n *Network) {
	t.Helper()
	hidden, open := listenUDP(t, "127.0.0.1:0"), listenUDP(t, hostIP+":0")
	eventually(t, "a datagram by the TAP device arrives", func() error {
		err := inNetNS(n.node.ns, func() error {
			// In this order, which the user-mode network keeps.
			return errors.Join(sendByTap(hidden.LocalAddr().String()), sendByTap(open.LocalAddr().String()))
		})
		if err != nil {
			return err
		}
		return received(open)
	})
	if err := received(hidden); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the host's 127.0.0.1 was reached from the node: %v", err)
	}
}

func listenUDP(t *testing.T, addr string) net.PacketConn {
	t.Helper()
	c, err := net.ListenPacket("udp", addr)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func received(c net.PacketConn) error {
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		return err
	}
	_, _, err := c.ReadFrom(make([]byte, 10))
	return err
}

func sendByTap(addr string) error {
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		failed := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), slirpTap) })
		return errors.Join(failed, err)
	}}
	conn, err := dialer.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("?"))
	return err
}
