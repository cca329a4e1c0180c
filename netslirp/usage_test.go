package netslirp

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestUsageIsAsThePodSeesIt(t *testing.T) {
	l := newLab(t)
	n := l.open()
	server, client := l.attach(n, "server"), l.attach(n, "client")
	const size = 1 << 20
	upload(t, server.ns, client.ns, join(server.ip, 80), size)

	var usage map[string]Traffic
	eventually(t, "counters at rest", func() (err error) {
		if usage, err = n.Usage(); err != nil || len(usage) != 2 {
			return fmt.Errorf("usage of 2 pods is %v, %w", usage, err)
		}
		for _, p := range []pod{server, client} {
			if inside := insideTraffic(t, p); usage[p.id] != inside {
				return fmt.Errorf("%s is said to have %+v, and sees %+v", p.id, usage[p.id], inside)
			}
		}
		return nil
	})
	if s, c := usage["server"], usage["client"]; s.RxBytes < size || s.TxBytes >= size || c.TxBytes < size || c.RxBytes >= size {
		t.Errorf("the client sent %d bytes: server %+v, client %+v", size, s, c)
	}

	must(t, n.Detach(context.Background(), client.id, client.ns))
	usage, err := n.Usage()
	if _, gone := usage["client"]; err != nil || len(usage) != 1 || gone {
		t.Errorf("after the detach: %v, %v", usage, err)
	}
}

// upload sends size bytes from one namespace to a server in the other, and waits until they are there.
func upload(t *testing.T, serverNS, clientNS, addr string, size int64) {
	t.Helper()
	var listener net.Listener
	within(t, serverNS, func() (err error) {
		listener, err = net.Listen("tcp", addr)
		return err
	})
	defer listener.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		conn, err := listener.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		if got, err := io.Copy(io.Discard, conn); err != nil || got != size {
			t.Errorf("%d bytes arrived, %v", got, err)
		}
	})
	var conn net.Conn
	within(t, clientNS, func() (err error) {
		conn, err = net.Dial("tcp", addr)
		return err
	})
	_, err := conn.Write(make([]byte, size))
	must(t, err)
	must(t, conn.Close())
}

// insideTraffic reads the counters of eth0 in the pod's own namespace.
func insideTraffic(t *testing.T, p pod) (got Traffic) {
	t.Helper()
	within(t, p.ns, func() error {
		link, err := netlink.LinkByName(podInterface)
		if err != nil {
			return err
		}
		s := link.Attrs().Statistics
		got = Traffic{Name: podInterface, RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped}
		return nil
	})
	return got
}

// BenchmarkUsage is one reading for 100 pods.
func BenchmarkUsage(b *testing.B) {
	l := newLab(b)
	n := l.open()
	for i := range 100 {
		l.attach(n, fmt.Sprint("p", i))
	}
	for b.Loop() {
		if usage, err := n.Usage(); err != nil || len(usage) != 100 {
			b.Fatalf("usage of %d pods, %v", len(usage), err)
		}
	}
}
