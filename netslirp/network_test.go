package netslirp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestPodsReachEachOtherTheNodeAndTheWorld(t *testing.T) {
	l := newLab(t)
	n := l.open()
	a, b := l.attach(n, "a"), l.attach(n, "b")
	if a.ip != "10.88.0.2" || b.ip != "10.88.0.3" || a.ip6 != sixOf("2") || b.ip6 != sixOf("3") {
		t.Fatalf("addresses %s %s and %s %s, want the first two after the gateway", a.ip, a.ip6, b.ip, b.ip6)
	}
	serveTCP(t, l.world, ":80", "world")
	serveTCP(t, a.ns, "127.0.0.1:81", "lo")
	for name, ns := range map[string]string{"b": b.ns, "node": l.node} {
		serveTCP(t, ns, ":80", name)
		serveUDP(t, ns, ":53", name)
	}
	for network, port := range map[string]int{"tcp": 80, "udp": 53} {
		wantAnswer(t, a.ns, network, join(b.ip, port), "b "+a.ip)
		wantAnswer(t, a.ns, network, join(b.ip6, port), "b "+a.ip6)
		wantAnswer(t, a.ns, network, join("10.88.0.1", port), "node "+a.ip)
		wantAnswer(t, a.ns, network, join(sixOf("1"), port), "node "+a.ip6)
		// As a kubelet does, whose probes come from the node's network namespace.
		wantAnswer(t, l.node, network, join(b.ip, port), "b 10.88.0.1")
		wantAnswer(t, l.node, network, join(b.ip6, port), "b "+sixOf("1"))
	}
	wantAnswer(t, a.ns, "tcp", join(uplinkIP, 80), "node "+a.ip)
	wantAnswer(t, a.ns, "tcp", "127.0.0.1:81", "lo 127.0.0.1")
	// The world has no route to pods: it answers because it sees the node's address.
	wantAnswer(t, a.ns, "tcp", join(worldIP, 80), "world "+uplinkIP)
	must(t, n.Ready())
	// Nobody has told the pods of a shorter way to each other.
	within(t, a.ns, func() error {
		counters, err := os.ReadFile("/proc/thread-self/net/snmp6")
		for line := range strings.Lines(string(counters)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "Icmp6InRedirects" && f[1] != "0" {
				t.Errorf("the pod was sent %s redirects", f[1])
			}
		}
		return err
	})
}

// sixOf is an address of the default IPv6 network of pods.
func sixOf(last string) string { return "fd63:6f72:6163:6c65::" + last }

func TestPodInterface(t *testing.T) {
	l := newLab(t)
	n := l.open()
	p := l.attach(n, "a")
	within(t, p.ns, func() error {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		if a := link.Attrs(); a.MTU != 65520 || a.HardwareAddr.String() != "0a:58:0a:58:00:02" {
			t.Errorf("eth0 has MTU %d and address %s", a.MTU, a.HardwareAddr)
		}
		addrs, err := netlink.AddrList(link, unix.AF_INET)
		if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != "10.88.0.2/32" {
			t.Errorf("eth0 has %v, %v", addrs, err)
		}
		if addrs, err = netlink.AddrList(link, unix.AF_INET6); err != nil || len(addrs) == 0 || addrs[0].IPNet.String() != sixOf("2")+"/128" {
			t.Errorf("eth0 has %v, %v", addrs, err)
		}
		for _, a := range addrs { // without the second of duplicate address detection
			if a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&unix.IFA_F_TENTATIVE != 0 {
				t.Errorf("%v is tentative", a)
			}
		}
		for name, want := range map[string]string{"accept_dad": "0", "accept_ra": "0"} {
			if got, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/" + name); err != nil || strings.TrimSpace(string(got)) != want {
				t.Errorf("%s is %q, %v", name, got, err)
			}
		}
		return nil
	})
	within(t, l.node, func() error { // for people: which pod is this
		link, err := netlink.LinkByAlias("a")
		if err != nil || !strings.HasPrefix(link.Attrs().Name, linkPrefix) {
			t.Errorf("link of pod a: %v, %v", link, err)
		}
		return nil
	})
}

func TestAttachRefusesWhatCannotBe(t *testing.T) {
	l := newLab(t)
	n := l.open()
	p := l.attach(n, "a")
	ctx := context.Background()
	_, err := n.Attach(ctx, AttachRequest{PodID: "a", NetNS: newNetNS(t)})
	wantIs(t, err, ErrAttached, "attach pod a")
	_, err = n.Attach(ctx, AttachRequest{PodID: "../a", NetNS: p.ns})
	wantIs(t, err, ErrInvalid, "pod id")
	_, err = n.Attach(ctx, AttachRequest{PodID: "b", NetNS: filepath.Join(t.TempDir(), "none")})
	wantIs(t, err, os.ErrNotExist, "none")
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	_, err = n.Attach(ctx, AttachRequest{PodID: "b", NetNS: file})
	wantIs(t, err, ErrInvalid, "is not a network namespace")
	_, err = n.Attach(ctx, AttachRequest{PodID: "b", NetNS: p.ns})
	wantIs(t, err, unix.EEXIST, "has an eth0 already")
	must(t, n.Detach(ctx, "a", p.ns))
	must(t, n.Detach(ctx, "a", p.ns))
	must(t, n.Detach(ctx, "never-was", ""))
	l.checkEmpty(n)
}

// A failed Attach leaves the pod's namespace as it was, so that it can be tried again at once.
func TestAttachUndoesItself(t *testing.T) {
	l := newLab(t)
	n := l.open()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer busy.Close()
	port := busy.Addr().(*net.TCPAddr).Port
	ns := newNetNS(t)
	_, err = n.Attach(context.Background(), AttachRequest{PodID: "a", NetNS: ns, Ports: []PortMapping{
		{Protocol: "udp", HostPort: port, ContainerPort: 80}, {Protocol: "tcp", HostPort: port, ContainerPort: 80}}})
	wantIs(t, err, ErrPortInUse, fmt.Sprintf("publish host port :%d/tcp: another program of the host has it", port))
	l.checkEmpty(n)
	_, err = n.Attach(context.Background(), AttachRequest{PodID: "a", NetNS: ns})
	must(t, err)
}

func TestAddressesRunOutAndComeBack(t *testing.T) {
	l := newLab(t)
	l.cfg.PodCIDR = "10.99.0.0/29" // .1 is the gateway, .7 broadcast
	n := l.open()
	var pods []pod
	for i := range 5 {
		pods = append(pods, l.attach(n, fmt.Sprint("p", i)))
	}
	ns := newNetNS(t)
	_, err := n.Attach(context.Background(), AttachRequest{PodID: "more", NetNS: ns})
	wantIs(t, err, ErrNoAddress, "take an address of 10.99.0.0/29, all 5 are in use")
	must(t, n.Detach(context.Background(), pods[2].id, pods[2].ns))
	// The old pod's namespace lives on, with the same address on its eth0: it must not answer for the new one.
	serveTCP(t, pods[2].ns, ":80", "old")
	got, err := n.Attach(context.Background(), AttachRequest{PodID: "more", NetNS: ns})
	must(t, err)
	if got.IP != pods[2].ip {
		t.Errorf("got %s, want the address that came back, %s", got.IP, pods[2].ip)
	}
	serveTCP(t, ns, ":80", "new")
	for range 20 {
		wantAnswer(t, pods[0].ns, "tcp", join(got.IP, 80), "new "+pods[0].ip)
	}
}

func TestManyPodsAtOnce(t *testing.T) {
	l := newLab(t)
	n := l.open()
	const count = 50
	spaces := make([]string, count)
	for i := range spaces {
		spaces[i] = newNetNS(t)
	}
	ips := make([]string, count)
	each(count, func(i int) {
		got, err := n.Attach(context.Background(), AttachRequest{PodID: fmt.Sprint("p", i), NetNS: spaces[i],
			Ports: []PortMapping{{HostPort: 20000 + i, ContainerPort: 80}}})
		if err != nil {
			t.Error(err)
		}
		ips[i] = got.IP
	})
	if slices.Sort(ips); len(slices.Compact(slices.Clone(ips))) != count {
		t.Fatalf("addresses are not all different: %v", ips)
	}
	links, err := n.node.links()
	if err != nil || len(links) != count {
		t.Errorf("%d links, %v; want %d", len(links), err, count)
	}
	each(count, func(i int) {
		if err := n.Detach(context.Background(), fmt.Sprint("p", i), spaces[i]); err != nil {
			t.Error(err)
		}
	})
	l.checkEmpty(n)
}

func each(count int, fn func(int)) {
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() { fn(i) })
	}
	wg.Wait()
}

func TestRestartKeepsPodsAndReconcileGivesBackTheRest(t *testing.T) {
	l := newLab(t)
	n := l.open()
	stays := l.attach(n, "stays", PortMapping{HostPort: 20080, ContainerPort: 80})
	l.attach(n, "gone", PortMapping{HostPort: 20081, ContainerPort: 80})
	client := l.attach(n, "client")
	serveTCP(t, stays.ns, ":80", "stays")
	must(t, n.Close())

	// What a crash may leave behind besides: an address without record, one without owner, half a record, a
	// link without record, a port that leads nowhere.
	ledger, err := openLedger(l.cfg.Dir, slog.Default())
	must(t, err)
	prefixes, err := parsePodCIDR(DefaultPodCIDR)
	must(t, err)
	pool, err := newPool(prefixes[0], ledger)
	must(t, err)
	_, err = pool.take("crashed")
	must(t, err)
	must(t, ledger.Close())
	must(t, os.WriteFile(filepath.Join(l.cfg.Dir, "ipam", "10.88.9.9"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(l.cfg.Dir, "pods", "half.json.tmp"), []byte("{"), 0o600))
	must(t, l.inNode(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = newLink()
		veth := netlink.NewVeth(attrs)
		veth.PeerName = "stray"
		return netlink.LinkAdd(veth)
	}))
	_, err = l.api.AddPort(context.Background(), PortMapping{Protocol: "tcp", HostPort: 20082, ContainerPort: 80}.spec(stays.addr().Next().Next().Next()))
	must(t, err)

	n = l.open()
	wantAnswer(t, client.ns, "tcp", join("10.88.0.1", 20080), "stays "+client.ip)
	must(t, n.Reconcile(context.Background(), map[string]bool{"stays": true, "client": true}))
	wantAnswer(t, client.ns, "tcp", join("10.88.0.1", 20080), "stays "+client.ip)
	wantAnswer(t, "", "tcp", "127.0.0.1:20080", "stays 10.88.0.1")
	wantSilence(t, "", "tcp", "127.0.0.1:20081")
	wantSilence(t, "", "tcp", "127.0.0.1:20082")
	if fresh := l.attach(n, "fresh"); fresh.ip == stays.ip || fresh.ip == client.ip {
		t.Errorf("%s was given twice", fresh.ip)
	}
	must(t, n.Reconcile(context.Background(), nil))
	l.checkEmpty(n)
}

// A node that was killed with all its processes leaves records, and a new node has a new namespace and port driver.
func TestReconcileAfterTheNodeItselfDied(t *testing.T) {
	l := newLab(t)
	n := l.open()
	l.attach(n, "a", PortMapping{HostPort: 20080, ContainerPort: 80})
	must(t, n.Close())
	again := newLab(t)
	again.cfg.Dir = l.cfg.Dir
	n = again.open()
	must(t, n.Reconcile(context.Background(), nil))
	again.checkEmpty(n)
}

// The store lost an address that a record has: it is reserved again, before somebody else gets it.
func TestAnAddressIsNeverGivenTwice(t *testing.T) {
	l := newLab(t)
	n := l.open()
	a := l.attach(n, "a")
	must(t, n.Close())
	must(t, os.RemoveAll(filepath.Join(l.cfg.Dir, "ipam")))
	n = l.open()
	if b := l.attach(n, "b"); b.ip == a.ip {
		t.Errorf("%s was given twice", b.ip)
	}
}

func TestDialPodAndListenNode(t *testing.T) {
	l := newLab(t)
	n := l.open()
	p := l.attach(n, "a")
	serveTCP(t, p.ns, "127.0.0.1:80", "four")
	serveTCP(t, p.ns, "[::1]:81", "six")
	ctx := context.Background()
	for addr, want := range map[string]string{"127.0.0.1:80": "four 127.0.0.1\n", "localhost:80": "four 127.0.0.1\n", "localhost:81": "six ::1\n"} {
		conn, err := n.DialPod(ctx, p.ns, addr)
		if err != nil {
			t.Error(err)
			continue
		}
		if got, err := io.ReadAll(conn); string(got) != want {
			t.Errorf("%s answered %q, %v", addr, got, err)
		}
		conn.Close()
	}
	_, err := n.DialPod(ctx, p.ns, "localhost:82")
	wantIs(t, err, unix.ECONNREFUSED, "localhost:82")
	_, err = n.DialPod(ctx, p.ns, "example.org:80")
	wantIs(t, err, ErrInvalid, "names are not resolved")
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err = n.DialPod(short, p.ns, "10.88.200.200:80") // nobody answers
	var late net.Error
	if !errors.As(err, &late) || !late.Timeout() {
		t.Errorf("dial of nobody: %v", err)
	}

	listener, err := n.ListenNode("127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	go func() {
		if c, err := listener.Accept(); err == nil {
			fmt.Fprintln(c, "stream")
			c.Close()
		}
	}()
	wantAnswer(t, l.node, "tcp", listener.Addr().String(), "stream")
	wantSilence(t, "", "tcp", listener.Addr().String()) // not the host's
	_, err = n.ListenNode("localhost:0")
	wantIs(t, err, ErrInvalid, "localhost")
	home(t)
}

// home checks that no thread that runs goroutines is in another network namespace.
func home(t testing.TB) {
	t.Helper()
	want, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if got, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || got != want {
				t.Errorf("a goroutine runs in %s, %v; want %s", got, err, want)
			}
			time.Sleep(time.Millisecond)
		})
	}
	wg.Wait()
}

func TestReadyTellsWhatIsMissing(t *testing.T) {
	l := newLab(t)
	n := l.open()
	must(t, n.Ready())
	within(t, l.world, func() error {
		link, err := netlink.LinkByName("up0")
		return errors.Join(err, netlink.LinkSetDown(link)) // as a TAP whose program ended: no carrier
	})
	if err := n.Ready(); err == nil || !strings.HasPrefix(err.Error(), "the user-mode network behind up0 has ended") {
		t.Errorf("without carrier: %v", err)
	}
	within(t, l.node, func() error { return netlink.RouteDel(&netlink.Route{Gw: net.ParseIP(worldIP)}) })
	if err := n.Ready(); err == nil {
		t.Error("ready without a default route")
	}
}

func TestOpenRefusesWhatCannotBe(t *testing.T) {
	l := newLab(t)
	cfg := l.cfg
	cfg.PodCIDR = "10.0.2.0/24"
	_, err := Open(cfg)
	wantIs(t, err, ErrInvalid, "overlaps 10.0.2.0/24")
	cfg = l.cfg
	cfg.Bridge = "up0"
	_, err = Open(cfg)
	wantIs(t, err, ErrInvalid, "up0 is a veth and not a bridge")
	cfg = l.cfg
	cfg.NetNS = cfg.Dir
	_, err = Open(cfg)
	wantIs(t, err, ErrInvalid, "is not a network namespace")
}

func TestCloseLeavesNoGoroutineAndNoDescriptor(t *testing.T) {
	l := newLab(t)
	n := l.open()
	l.attach(n, "warm")
	must(t, n.Close())
	existing, before := goleak.IgnoreCurrent(), descriptors(t)
	n, err := Open(l.cfg)
	must(t, err)
	p := l.attach(n, "a")
	must(t, n.Ready())
	must(t, n.Detach(context.Background(), "a", p.ns))
	must(t, n.Close())
	must(t, n.Close())
	goleak.VerifyNone(t, existing, goleak.IgnoreAnyFunction("net/http.(*conn).serve"))
	eventually(t, "descriptors", func() error {
		if after := descriptors(t); after > before+1 { // the server's end of the API connection
			return fmt.Errorf("%d descriptors before, %d after", before, after)
		}
		return nil
	})
	_, err = n.Attach(context.Background(), AttachRequest{PodID: "b", NetNS: p.ns})
	wantIs(t, err, ErrClosed, "b")
	wantIs(t, n.Detach(context.Background(), "a", ""), ErrClosed, "a")
}

func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}
