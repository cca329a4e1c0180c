package netslirp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/gorilla/mux"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/router"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/builtin"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

func TestMain(m *testing.M) {
	if served, err := serveRole(m); served {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	nstest.Main(m)
}

// lab is a node's network namespace with an uplink to another one, and rootlesskit's port driver, both halves in
// this process: everything of a node but the user-mode network.
type lab struct {
	t     testing.TB
	node  string // namespaces, by path
	world string
	api   port.Manager // the real port driver
	cfg   Config
}

const (
	worldIP  = "10.0.2.2" // what pods reach outside
	uplinkIP = "10.0.2.100"
)

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t, node: newNetNS(t), world: newNetNS(t)}
	world, err := openNetNS(l.world)
	must(t, err)
	defer world.Close()
	must(t, setUpLo()) // the namespace of the tests is the "host"
	within(t, l.node, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = "up0", net.FlagUp
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "up0", netlink.NsFd(int(world.Fd()))
		return errors.Join(setUpLo(), netlink.LinkAdd(veth), address("up0", uplinkIP+"/24"))
	})
	within(t, l.world, func() error { return errors.Join(setUpLo(), address("up0", worldIP+"/24")) })
	within(t, l.node, func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(worldIP)})
	})
	dir, err := os.MkdirTemp("", "lab") // t.TempDir holds the test's name, and a socket's path 107 bytes
	must(t, err)
	t.Cleanup(func() { must(t, os.Remove(dir)) })
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "")) // as XDG_RUNTIME_DIR is
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	l.cfg = Config{NetNS: l.node, APISocket: filepath.Join(dir, "api.sock"), Dir: filepath.Join(dir, "net"), DNS: "10.0.2.3"}
	l.startPortDriver(dir)
	return l
}

// startPortDriver runs what rootlesskit's parent and child run.
func (l *lab) startPortDriver(dir string) {
	t := l.t
	parent, err := builtin.NewParentDriver(io.Discard, dir, false)
	must(t, err)
	quit, childDone, parentDone, up := make(chan struct{}), make(chan error, 1), make(chan error, 1), make(chan struct{})
	go func() {
		childDone <- portChild{log: io.Discard}.RunChildDriver(parent.OpaqueForChild(), quit, l.node)
	}()
	go func() { parentDone <- parent.RunParentDriver(up, quit, nil) }()
	select {
	case <-up:
	case err := <-parentDone:
		t.Fatalf("port driver: %v", err)
	case err := <-childDone:
		t.Fatalf("port driver's child: %v", err)
	case <-time.After(time.Minute):
		stacks := make([]byte, 1<<20)
		t.Fatalf("the port driver does not start:\n%s", stacks[:runtime.Stack(stacks, true)])
	}
	listener, err := net.Listen("unix", l.cfg.APISocket)
	must(t, err)
	r := mux.NewRouter()
	router.AddRoutes(r, &router.Backend{PortDriver: parent})
	server := &http.Server{Handler: r}
	go func() { _ = server.Serve(listener) }() // ends with Close
	l.api = parent
	t.Cleanup(func() {
		ports, _ := parent.ListPorts(context.Background())
		for _, p := range ports { // closing the driver does not close them
			must(t, parent.RemovePort(context.Background(), p.ID))
		}
		must(t, server.Close())
		close(quit)
		must(t, errors.Join(<-parentDone, <-childDone))
	})
}

func (l *lab) open() *Network {
	l.t.Helper()
	n, err := Open(l.cfg)
	must(l.t, err)
	l.t.Cleanup(func() {
		if err := n.Close(); err != nil {
			l.t.Error(err)
		}
	})
	return n
}

// pod is a namespace with an attachment.
type pod struct{ id, ns, ip, ip6 string }

func (l *lab) attach(n *Network, id string, ports ...PortMapping) pod {
	l.t.Helper()
	p := pod{id: id, ns: newNetNS(l.t)}
	got, err := n.Attach(context.Background(), AttachRequest{PodID: id, NetNS: p.ns, Ports: ports})
	must(l.t, err)
	p.ip, p.ip6 = got.IP, strings.Join(got.AdditionalIPs, " ")
	return p
}

// checkEmpty compares kernel, disk, port driver and memory: no trace of any pod.
func (l *lab) checkEmpty(n *Network) {
	l.t.Helper()
	eventually(l.t, "veths gone", func() error {
		return l.inNode(func() error {
			links, err := netlink.LinkList()
			for _, link := range links {
				if strings.HasPrefix(link.Attrs().Name, linkPrefix) {
					err = errors.Join(err, fmt.Errorf("link %s is left", link.Attrs().Name))
				}
			}
			return err
		})
	})
	for _, pattern := range []string{"pods/*", "ipam/[0-9]*", "*.tmp"} {
		if left, _ := filepath.Glob(filepath.Join(l.cfg.Dir, pattern)); len(left) > 0 {
			l.t.Errorf("files left: %v", left)
		}
	}
	if ports, err := l.api.ListPorts(context.Background()); err != nil || len(ports) > 0 {
		l.t.Errorf("published ports left: %v, %v", ports, err)
	}
	eventually(l.t, "tables and neighbours empty", func() error { return l.inNode(func() error { return emptyTables(n) }) })
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pods) > 0 || len(n.busy) > 0 || len(n.ledger.held) > 0 {
		l.t.Errorf("in memory: pods %v, busy %v, addresses %v", n.pods, n.busy, n.ledger.held)
	}
}

// emptyTables is called inside the node's namespace.
func emptyTables(n *Network) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	var sets []*nftables.Set
	for _, f := range n.node.families() {
		sets = append(sets, newTables(f).sets()...)
	}
	for _, set := range newGuardTable().pods {
		sets = append(sets, set)
	}
	for _, set := range sets {
		found, err := conn.GetSetByName(set.Table, set.Name)
		if err != nil {
			return err
		}
		elements, err := conn.GetSetElements(found)
		if err != nil || len(elements) > 0 {
			return fmt.Errorf("elements of %s left: %v, %w", set.Name, elements, err)
		}
	}
	left, err := n.node.neighbours()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("neighbours are left: %v", left)
	}
	return err
}

func (l *lab) inNode(fn func() error) error {
	ns, err := openNetNS(l.node)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inNetNS(ns, fn)
}

// newNetNS binds a new network namespace on a file, as a pod's is.
func newNetNS(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, OnOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}))
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // a test may have done so
			t.Error(err)
		}
	})
	return path
}

func within(t testing.TB, path string, fn func() error) {
	t.Helper()
	ns, err := openNetNS(path)
	must(t, err)
	defer ns.Close()
	must(t, inNetNS(ns, fn))
}

func setUpLo() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func address(link, cidr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD
	}
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

// serveTCP answers each connection inside the namespace with "name clientIP" and a newline.
func serveTCP(t testing.TB, ns, addr, name string) {
	t.Helper()
	var l net.Listener
	within(t, ns, func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			c.Close()
		}
	}()
}

// serveUDP answers each datagram with "name clientIP".
func serveUDP(t testing.TB, ns, addr, name string) {
	t.Helper()
	var c net.PacketConn
	within(t, ns, func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	})
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			fmt.Fprintf(to{c, from}, "%s %s\n", name, from.(*net.UDPAddr).AddrPort().Addr().Unmap())
		}
	}()
}

type to struct {
	net.PacketConn
	addr net.Addr
}

func (w to) Write(b []byte) (int, error) { return w.WriteTo(b, w.addr) }

// ask sends an empty datagram or connects, and returns the line that comes back.
func ask(ns, network, addr string) (string, error) {
	var conn net.Conn
	dial := func() (err error) {
		conn, err = (&net.Dialer{Timeout: 2 * time.Second, FallbackDelay: -1}).Dial(network, addr)
		return err
	}
	err := error(nil)
	if ns == "" {
		err = dial()
	} else {
		var f *os.File
		if f, err = openNetNS(ns); err != nil {
			return "", err
		}
		defer f.Close()
		err = inNetNS(f, dial)
	}
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return "", err
	}
	if network == "udp" {
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

func wantAnswer(t testing.TB, ns, network, addr, want string) {
	t.Helper()
	got, err := ask(ns, network, addr)
	if err != nil || got != want {
		t.Errorf("%s %s answered %q, %v; want %q", network, addr, got, err, want)
	}
}

func wantSilence(t testing.TB, ns, network, addr string) {
	t.Helper()
	if got, err := ask(ns, network, addr); err == nil {
		t.Errorf("%s %s answered %q, want none", network, addr, got)
	}
}

func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantIs(t testing.TB, err, target error, text string) {
	t.Helper()
	if !errors.Is(err, target) || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("error is %v, want %v with %q", err, target, text)
	}
}

func join(ip string, port int) string {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(port)).String()
}
