package netslirp

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
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
			return errors.Join(sendByTap(hidden.LocalAddr().String(), 1), sendByTap(open.LocalAddr().String(), 1))
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

// sendAllTheWhile sends to the host's loopback by the TAP device until the function that it returns is called, which fails the
// test where anything has arrived.
func sendAllTheWhile(t *testing.T, n *Network) (stop func()) {
	t.Helper()
	hidden := listenUDP(t, "127.0.0.1:0")
	// As a pod with CAP_NET_ADMIN could: whatever is sent can pass as soon as anybody reads from the device.
	must(t, inNetNS(n.node.ns, func() error {
		tap, err := netlink.LinkByName(slirpTap)
		if err != nil {
			return err
		}
		mac := net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2} // slirp4netns's, for 10.0.2.2
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: tap.Attrs().Index, IP: net.ParseIP(slirpGateway), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
	}))
	stopped, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- inNetNS(n.node.ns, func() error {
			for {
				_ = sendByTap(hidden.LocalAddr().String(), 100) // in vain while the device is down
				select {
				case <-stopped:
					return nil
				default:
				}
			}
		})
	}()
	return func() {
		t.Helper()
		wantFiltered(t, n) // what was sent has come through by then
		close(stopped)
		must(t, <-done)
		if err := received(hidden); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the host's 127.0.0.1 was reached while slirp4netns started: %v", err)
		}
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

// sendByTap gives up soon: what waits for a neighbour fills a socket's buffer.
func sendByTap(addr string, times int) error {
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
	err = conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	for ; err == nil && times > 0; times-- {
		_, err = conn.Write([]byte("?"))
	}
	return err
}
