package netslirp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func (p pod) addr() netip.Addr { return netip.MustParseAddr(p.ip) }

func TestHostPorts(t *testing.T) {
	l := newLab(t)
	n := l.open()
	server := l.attach(n, "server",
		PortMapping{Protocol: "TCP", HostPort: 20080, ContainerPort: 80},
		PortMapping{Protocol: "udp", HostPort: 20080, ContainerPort: 53},
		PortMapping{Protocol: "tcp", HostPort: 20081, ContainerPort: 80, HostIP: "127.0.0.1"},
		PortMapping{Protocol: "tcp", ContainerPort: 9})
	client := l.attach(n, "client")
	serveTCP(t, server.ns, ":80", "tcp")
	serveUDP(t, server.ns, ":53", "udp")
	gateway6 := sixOf("1")

	// From the host, through the port driver.
	wantAnswer(t, "", "tcp", "127.0.0.1:20081", "tcp 10.88.0.1")
	wantSilence(t, "", "tcp", "[::1]:20081")
	for _, network := range []string{"tcp", "udp"} {
		wantAnswer(t, "", network, "127.0.0.1:20080", network+" 10.88.0.1")
		wantAnswer(t, "", network, "[::1]:20080", network+" 10.88.0.1")
		// From another pod, at each of the node's addresses, with the pod's own address.
		wantAnswer(t, client.ns, network, join("10.88.0.1", 20080), network+" "+client.ip)
		wantAnswer(t, client.ns, network, join(uplinkIP, 20080), network+" "+client.ip)
		wantAnswer(t, client.ns, network, join(gateway6, 20080), network+" "+client.ip6)
		// From the pod itself.
		wantAnswer(t, server.ns, network, join(uplinkIP, 20080), network+" 10.88.0.1")
		wantAnswer(t, server.ns, network, join("10.88.0.1", 20080), network+" 10.88.0.1")
		wantAnswer(t, server.ns, network, join(gateway6, 20080), network+" "+gateway6)
		// From the node, where a kubelet and host-network pods are.
		wantAnswer(t, l.node, network, join("127.0.0.1", 20080), network+" 10.88.0.1")
		wantAnswer(t, l.node, network, join("10.88.0.1", 20080), network+" 10.88.0.1")
		wantAnswer(t, l.node, network, join(uplinkIP, 20080), network+" "+uplinkIP)
		wantAnswer(t, l.node, network, join(gateway6, 20080), network+" "+gateway6)
		// From outside the node, as another node of a cluster would.
		wantAnswer(t, l.world, network, join(uplinkIP, 20080), network+" "+worldIP)
	}
	// The kernel translates no ::1; who asks for localhost is told so, and takes the next address.
	_, err := ask(l.node, "tcp", "[::1]:20080")
	wantIs(t, err, unix.ECONNREFUSED, "[::1]:20080")
	for _, node := range []string{"10.88.0.1", uplinkIP, gateway6} {
		wantSilence(t, client.ns, "tcp", join(node, 20081)) // asked for the loopback only
	}
	wantAnswer(t, l.node, "tcp", "127.0.0.1:20081", "tcp 10.88.0.1")
	wantSilence(t, l.node, "tcp", join(uplinkIP, 20081))

	must(t, n.Detach(context.Background(), "server", server.ns))
	wantSilence(t, "", "tcp", "127.0.0.1:20080")
	wantSilence(t, client.ns, "tcp", join(uplinkIP, 20080))
	wantSilence(t, client.ns, "tcp", join(gateway6, 20080))
	must(t, n.Detach(context.Background(), "client", client.ns))
	l.checkEmpty(n)
}

// Pods share a host port, each at an address of its own (as the conformance tests of Kubernetes ask for).
func TestHostPortsAtAddresses(t *testing.T) {
	l := newLab(t)
	n := l.open()
	at := func(ip string) PortMapping { return PortMapping{HostPort: 20080, ContainerPort: 80, HostIP: ip} }
	gateway6 := sixOf("1")
	pods := map[string]pod{}
	for _, ip := range []string{"127.0.0.1", "::1", uplinkIP, gateway6, "10.88.0.1"} {
		udp := at(ip)
		udp.Protocol = "udp"
		pods[ip] = l.attach(n, fmt.Sprint("p", len(pods)), at(ip), udp)
		serveTCP(t, pods[ip].ns, ":80", ip)
		serveUDP(t, pods[ip].ns, ":80", ip)
	}
	client := l.attach(n, "client")
	for _, network := range []string{"tcp", "udp"} {
		wantAnswer(t, l.node, network, "127.0.0.1:20080", "127.0.0.1 10.88.0.1")
		wantAnswer(t, l.node, network, join(uplinkIP, 20080), uplinkIP+" "+uplinkIP)
		wantAnswer(t, l.node, network, join("10.88.0.1", 20080), "10.88.0.1 10.88.0.1")
		wantAnswer(t, l.node, network, join(gateway6, 20080), gateway6+" "+gateway6)
		wantAnswer(t, client.ns, network, join(uplinkIP, 20080), uplinkIP+" "+client.ip)
		wantAnswer(t, client.ns, network, join(gateway6, 20080), gateway6+" "+client.ip6)
		wantAnswer(t, "", network, "127.0.0.1:20080", "127.0.0.1 10.88.0.1")
		wantAnswer(t, "", network, "[::1]:20080", "::1 "+gateway6)
	}
	_, err := ask(l.node, "tcp", "[::1]:20080")
	wantIs(t, err, unix.ECONNREFUSED, "[::1]:20080")
	for _, p := range append([]pod{client}, slices.Collect(maps.Values(pods))...) {
		must(t, n.Detach(context.Background(), p.id, p.ns))
	}
	l.checkEmpty(n)
}

// A program of the node that listens on the loopback is not the pods' to reach, though host ports answer there.
func TestPodsDoNotReachTheNodesLoopback(t *testing.T) {
	l := newLab(t)
	n := l.open()
	p := l.attach(n, "a", PortMapping{HostPort: 20080, ContainerPort: 80})
	serveTCP(t, l.node, "127.0.0.1:8080", "node")
	serveTCP(t, p.ns, p.ip+":80", "pod")
	wantAnswer(t, l.node, "tcp", "127.0.0.1:8080", "node 127.0.0.1")
	within(t, p.ns, func() error { // what a pod with CAP_NET_ADMIN, or with raw sockets, can send
		if err := writeSysctl("ipv4/conf/eth0/route_localnet", "1"); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		loopback := netip.MustParsePrefix("127.0.0.1/8")
		return errors.Join(netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(loopback)}),
			netlink.RouteAdd(&netlink.Route{Dst: ipNet(loopback.Masked()), Gw: net.ParseIP("10.88.0.1")}))
	})
	for _, port := range []string{"8080", "20080"} {
		wantSilence(t, p.ns, "tcp", "127.0.0.1:"+port)
	}
}

func TestHostPortConflictsNameThePort(t *testing.T) {
	l := newLab(t)
	n := l.open()
	first := l.attach(n, "first", PortMapping{HostPort: 20080, ContainerPort: 80})
	ask := func(ports ...PortMapping) error {
		_, err := n.Attach(context.Background(), AttachRequest{PodID: "second", NetNS: newNetNS(t), Ports: ports})
		return err
	}
	wantIs(t, ask(PortMapping{HostPort: 20080, ContainerPort: 81}), ErrPortInUse, "publish host port :20080/tcp: pod first has it")
	wantIs(t, ask(PortMapping{HostPort: 20080, ContainerPort: 81, HostIP: "127.0.0.1"}), ErrPortInUse, "127.0.0.1:20080/tcp: pod first")
	wantIs(t, ask(PortMapping{HostPort: 20082, ContainerPort: 1}, PortMapping{HostPort: 20082, ContainerPort: 2}), ErrPortInUse, "the same pod asks for")
	wantIs(t, ask(PortMapping{HostPort: 20082, ContainerPort: 1, HostIP: "192.0.2.1"}), ErrInvalid, "the host has no address 192.0.2.1")
	wantIs(t, ask(PortMapping{Protocol: "sctp", HostPort: 20082, ContainerPort: 1}), ErrUnsupported, "carries SCTP")
	must(t, ask(PortMapping{Protocol: "udp", HostPort: 20080, ContainerPort: 81}))
	must(t, n.Detach(context.Background(), "second", ""))
	must(t, n.Detach(context.Background(), "first", first.ns))
	must(t, ask(PortMapping{HostPort: 20080, ContainerPort: 81}))
}

func TestNormalize(t *testing.T) {
	got, err := normalize([]PortMapping{{HostPort: 0, ContainerPort: 80, Protocol: "sctp"}, {HostPort: 1, ContainerPort: 2}})
	if err != nil || fmt.Sprint(got) != "[:1/tcp]" {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []PortMapping{
		{Protocol: "icmp", HostPort: 1, ContainerPort: 1},
		{HostPort: -1, ContainerPort: 1}, {HostPort: 65536, ContainerPort: 1}, {HostPort: 1}, {HostPort: 1, ContainerPort: 65536},
		{HostPort: 1, ContainerPort: 1, HostIP: "localhost"},
	} {
		_, err := normalize([]PortMapping{bad})
		wantIs(t, err, ErrInvalid, "publish host port")
	}
}

func TestOverlapsAsTheKernelBinds(t *testing.T) {
	at := func(ip string) PortMapping { return PortMapping{Protocol: "tcp", HostPort: 80, HostIP: ip} }
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"", "", true}, {"", "127.0.0.1", true}, {"", "::1", true}, {"0.0.0.0", "127.0.0.1", true}, {"0.0.0.0", "", true},
		{"0.0.0.0", "::", false}, {"0.0.0.0", "::1", false}, {"::", "::1", true}, {"::", "127.0.0.1", false},
		{"127.0.0.1", "127.0.0.1", true}, {"127.0.0.1", "127.0.0.2", false}, {"127.0.0.1", "::ffff:127.0.0.1", true},
	} {
		if got := at(c.a).overlaps(at(c.b)); got != c.want || at(c.b).overlaps(at(c.a)) != got {
			t.Errorf("%q and %q overlap: %v", c.a, c.b, got)
		}
	}
	udp := at("")
	udp.Protocol = "udp"
	if at("").overlaps(udp) {
		t.Error("TCP and UDP do not share ports")
	}
}

func TestExplainPublish(t *testing.T) {
	m := PortMapping{Protocol: "tcp", HostPort: 80}
	wantIs(t, explainPublish(errors.New("cannot expose privileged port 80, …: listen tcp :80: bind: permission denied"), m),
		ErrPortReserved, "run: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80")
	wantIs(t, explainPublish(errors.New("listen tcp :80: bind: address already in use"), m), ErrPortInUse, "another program")
	other := errors.New("broken")
	wantIs(t, explainPublish(other, m), other, "broken")
}

func TestSpec(t *testing.T) {
	pod := netip.MustParseAddr("10.88.0.2")
	for ip, proto := range map[string]string{"": "tcp", "0.0.0.0": "tcp4", "127.0.0.1": "tcp4", "::": "tcp6", "::1": "tcp6"} {
		s := PortMapping{Protocol: "tcp", HostPort: 8080, ContainerPort: 80, HostIP: ip}.spec(pod)
		if s.Proto != proto || s.ParentIP != ip || s.ParentPort != 8080 || s.ChildIP != "10.88.0.2" || s.ChildPort != 80 {
			t.Errorf("%q: %+v", ip, s)
		}
	}
}

// TestPublishIsNotCutOff: a request that is left behind would be served after the undo has looked for ports.
func TestPublishIsNotCutOff(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "api.sock")
	listener, err := net.Listen("unix", socket)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var served atomic.Bool
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		time.Sleep(50 * time.Millisecond)
		served.Store(true)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(`{"id":1,"spec":{}}`))
	})}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	p := newPublisher(socket)
	m := PortMapping{Protocol: "tcp", HostPort: 8080, ContainerPort: 80}
	if err := p.publish(ctx, netip.MustParseAddr("10.88.0.2"), m); err != nil || !served.Load() {
		t.Errorf("cut off: %v", err)
	}
	if err := p.publish(ctx, netip.MustParseAddr("10.88.0.2"), m); !errors.Is(err, context.Canceled) {
		t.Errorf("began for a caller that is gone: %v", err)
	}
	p.close()
	must(t, server.Close())
	wantIs(t, <-done, http.ErrServerClosed, "closed")
}
