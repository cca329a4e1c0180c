package netslirp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/vishvananda/netlink"
)

const clientIP = "192.0.2.9" // of the host, and not its loopback

// TestClientAddresses: a pod is shown the client's address. The node itself, where the API server and node ports are,
// is never tried with it: it would answer into the user-mode network, and the client would wait for the next try.
func TestClientAddresses(t *testing.T) {
	l := newLab(t)
	n := l.open()
	must(t, address("lo", clientIP+"/32"))
	t.Cleanup(func() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(clientIP + "/32"))}))
	})
	server := l.attach(n, "server", PortMapping{HostPort: 20080, ContainerPort: 80})
	serveTCP(t, server.ns, ":80", "pod")
	serveTCP(t, l.node, ":6443", "node")
	wantAnswer(t, "", "tcp", clientIP+":20080", "pod "+clientIP)

	callers := l.callersOf(6443)
	for i, target := range []string{uplinkIP, "10.88.0.1", "127.0.0.1", ""} {
		_, err := l.api.AddPort(context.Background(), port.Spec{Proto: "tcp", ParentPort: 20081 + i, ChildIP: target, ChildPort: 6443})
		must(t, err)
		if got, err := ask("", "tcp", join(clientIP, 20081+i)); err != nil || !strings.HasPrefix(got, "node ") {
			t.Errorf("the node's port at %q answered %q, %v", target, got, err)
		}
	}
	if got := callers(); len(got) != 4 || slices.Contains(got, clientIP) {
		t.Errorf("the node's port was dialed from %v, want four times and never from %s", got, clientIP)
	}
	must(t, l.inNode(func() error {
		for addr, of := range map[string]bool{"::1": true, sixOf("1"): true, uplinkIP: true, server.ip: false, server.ip6: false, worldIP: false} {
			if got := ofNode(netip.MustParseAddr(addr)); got != of {
				t.Errorf("%s is the node's: %v", addr, got)
			}
		}
		return nil
	}))
	must(t, n.Detach(context.Background(), server.id, server.ns))
}

// callersOf notes from which addresses connections to a port of the node are begun, whether they come to be or not,
// until the returned function asks for them.
func (l *lab) callersOf(port uint16) func() []string {
	t := l.t
	t.Helper()
	var raw *net.IPConn
	within(t, l.node, func() (err error) {
		raw, err = net.ListenIP("ip4:tcp", nil)
		return err
	})
	var (
		seen []string
		done = make(chan error, 1)
	)
	go func() {
		segment := make([]byte, 1<<16)
		for {
			n, from, err := raw.ReadFromIP(segment)
			if err != nil {
				done <- err
				return
			}
			const flags, syn, ack = 13, 0x02, 0x10 // RFC 9293
			if n > flags && uint16(segment[2])<<8|uint16(segment[3]) == port && segment[flags]&(syn|ack) == syn {
				seen = append(seen, from.IP.String())
			}
		}
	}()
	return func() []string {
		t.Helper()
		must(t, raw.Close())
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		return seen
	}
}
