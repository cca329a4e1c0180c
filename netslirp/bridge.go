package netslirp

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkPrefix and 12 hex digits name the node's end of a pod's veth: 15 bytes, the most that Linux takes.
const linkPrefix = "pod"

// newLink returns a name that no link had or will have, so that a link that is still being deleted is never
// mistaken for a new pod's.
func newLink() string {
	raw := make([]byte, 6)
	rand.Read(raw) // never fails (crypto/rand)
	return linkPrefix + hex.EncodeToString(raw)
}

// hardwareAddr derives a MAC from the address, as CNI's bridge plugin does. An address that is given again thus
// answers at the MAC that neighbour caches already hold for it.
func hardwareAddr(ip netip.Addr) net.HardwareAddr {
	b := ip.As16()
	return net.HardwareAddr{0x0a, 0x58, b[12], b[13], b[14], b[15]} // 0x0a: locally administered, unicast
}

// node is the kernel's side: the node's network namespace, its bridge and the links of the pods.
type node struct {
	ns     *os.File
	route  *netlink.Handle // its socket is inside ns; safe for use by several goroutines
	bridge netlink.Link
	reaper *reaper
}

// openNode enters the namespace at path and makes what is missing of the bridge.
func openNode(path, bridge string, mtu int, gateway netip.Addr) (*node, error) {
	ns, err := openNetNS(path)
	if err != nil {
		return nil, err
	}
	n := &node{ns: ns}
	if err := n.setUp(bridge, mtu, gateway); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func (n *node) setUp(bridge string, mtu int, gateway netip.Addr) error {
	err := inNetNS(n.ns, func() (err error) {
		// /proc/sys/net shows the namespace of the thread that opens it.
		if err := writeSysctl("ipv4/ip_forward", "1"); err != nil {
			return err
		}
		if n.route, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open netlink socket of the node: %w", err)
		}
		if n.reaper, err = startReaper(); err != nil {
			return err
		}
		if err := routeForeign(n.route); err != nil {
			return err
		}
		if n.bridge, err = ensureBridge(n.route, bridge, mtu, gateway); err != nil {
			return err
		}
		// Pods of one bridge reach each other through it: do not tell them of a shorter way. The kernel
		// sends redirects where either of the two says so.
		return errors.Join(writeSysctl("ipv4/conf/all/send_redirects", "0"),
			writeSysctl("ipv4/conf/"+bridge+"/send_redirects", "0"))
	})
	if err != nil {
		return err
	}
	n.reaper.kick() // what a crash left retired
	return nil
}

// routeLoopback lets connections of the node's own 127.0.0.1 reach pods by the bridge. The firewall has to stand.
func (n *node) routeLoopback() error {
	return inNetNS(n.ns, func() error { return writeSysctl("ipv4/conf/"+n.bridge.Attrs().Name+"/route_localnet", "1") })
}

func (n *node) close() error {
	if n.reaper != nil {
		n.reaper.close()
	}
	if n.route != nil {
		n.route.Close()
	}
	return n.ns.Close()
}

// writeSysctl sets net.<name> of the calling thread's namespace.
func writeSysctl(name, value string) error {
	path := "/proc/sys/net/" + name
	if have, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) == value {
		return nil // also where /proc/sys is read-only
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl net.%s=%s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

func ensureBridge(h *netlink.Handle, name string, mtu int, gateway netip.Addr) (netlink.Link, error) {
	var missing netlink.LinkNotFoundError
	link, err := h.LinkByName(name)
	if errors.As(err, &missing) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		// Without an address of its own a bridge takes the lowest of its ports', and changes it as pods come and go.
		attrs.HardwareAddr = hardwareAddr(gateway)
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return nil, fmt.Errorf("make bridge %s: %w", name, err)
		}
		link, err = h.LinkByName(name)
	}
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", name, err)
	}
	if link.Type() != "bridge" {
		return nil, fmt.Errorf("%s is a %s and not a bridge: %w", name, link.Type(), ErrInvalid)
	}
	if link.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(link, mtu); err != nil {
			return nil, fmt.Errorf("set MTU of %s: %w", name, err)
		}
		link.Attrs().MTU = mtu
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", name, err)
	}
	return link, nil
}

// routeForeign delivers what the firewall marks to the node itself, whatever its address: "ip rule add fwmark M
// lookup M" and "ip route add local default dev lo table M". It is idempotent.
func routeForeign(h *netlink.Handle) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo of the node: %w", err)
	}
	everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: everywhere, Table: foreignMark,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
		return fmt.Errorf("add route for foreign source addresses: %w", err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = unix.AF_INET, foreignMark, foreignMark, 100
	if err := h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add routing rule for foreign source addresses: %w", err)
	}
	return nil
}

// addGateway gives the bridge the pool's first address. It is idempotent.
func (n *node) addGateway(p *pool) error {
	addrs, err := n.route.AddrList(nil, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list addresses of the node: %w", err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		ones, _ := a.Mask.Size()
		other := netip.PrefixFrom(ip.Unmap(), ones).Masked()
		if a.LinkIndex != n.bridge.Attrs().Index && other.Overlaps(p.prefix) {
			return fmt.Errorf("pod CIDR %s overlaps %s, which the node has: %w", p.prefix, other, ErrInvalid)
		}
	}
	gateway := &net.IPNet{IP: p.gateway.AsSlice(), Mask: net.CIDRMask(p.prefix.Bits(), p.gateway.BitLen())}
	if err := n.route.AddrReplace(n.bridge, &netlink.Addr{IPNet: gateway}); err != nil {
		return fmt.Errorf("give %s the address %s: %w", n.bridge.Attrs().Name, gateway, err)
	}
	return nil
}

// plug links the pod's namespace to the bridge and configures its end.
func (n *node) plug(r *record, pod *os.File, gateway netip.Addr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex = r.Link, n.bridge.Attrs().MTU, n.bridge.Attrs().Index
	attrs.Flags = net.FlagUp
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerNamespace = podInterface, uint32(attrs.MTU), netlink.NsFd(int(pod.Fd()))
	veth.PeerHardwareAddr = hardwareAddr(r.ip())
	if err := n.route.LinkAdd(veth); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make veth %s: the pod's namespace has an %s already: %w", r.Link, podInterface, err)
		}
		return fmt.Errorf("make veth %s: %w", r.Link, err)
	}
	// Where br_netfilter is on, a Service's DNAT happens inside the bridge and may lead back to the same port.
	if err := n.route.LinkSetHairpin(veth, true); err != nil {
		return fmt.Errorf("set hairpin of %s: %w", r.Link, err)
	}
	return inNetNS(pod, func() error { return configurePod(r, gateway) })
}

// configurePod runs on a thread inside the pod's namespace.
func configurePod(r *record, gateway netip.Addr) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink socket of the pod: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo of the pod: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo of the pod up: %w", err)
	}
	link, err := h.LinkByName(podInterface)
	if err != nil {
		return fmt.Errorf("find %s of the pod: %w", podInterface, err)
	}
	// Nobody else can have this veth's link-local address; without this, binding it fails for the second that
	// duplicate address detection takes. A kernel without IPv6 has no such file.
	if err := writeSysctl("ipv6/conf/"+podInterface+"/accept_dad", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EROFS) {
		return err
	}
	for _, a := range r.Addresses {
		addr := &netlink.Addr{IPNet: host(a)}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", podInterface, a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", podInterface, err)
	}
	index := link.Attrs().Index
	if err := h.RouteAdd(&netlink.Route{LinkIndex: index, Dst: host(gateway), Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("add route to the gateway %s: %w", gateway, err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: index, Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("add default route by %s: %w", gateway, err)
	}
	return nil
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// unplug sets the link down, after which no frame passes, the bridge has forgotten the pod's MAC, and nothing
// answers at its address; and retires it. Deleting it takes 30 ms, this 0.2: the reaper does the former. It is
// idempotent.
func (n *node) unplug(name string) error {
	var missing netlink.LinkNotFoundError
	link, err := n.route.LinkByName(name)
	if errors.As(err, &missing) {
		return nil // went with the pod's namespace
	}
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	for _, step := range []func() error{
		func() error { return n.route.LinkSetDown(link) },
		func() error { return n.route.LinkSetGroup(link, retiredGroup) },
	} {
		if err := step(); errors.Is(err, unix.ENODEV) {
			return nil
		} else if err != nil {
			return fmt.Errorf("retire link %s: %w", name, err)
		}
	}
	n.reaper.kick()
	return nil
}

// remove deletes the link and waits for that, so that the pod's namespace is as it was.
func (n *node) remove(name string) error {
	var missing netlink.LinkNotFoundError
	link, err := n.route.LinkByName(name)
	if errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = n.route.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// links lists the pods' links.
func (n *node) links() ([]string, error) {
	all, err := n.route.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links of the node: %w", err)
	}
	var names []string
	for _, l := range all {
		name := l.Attrs().Name
		if l.Type() == "veth" && strings.HasPrefix(name, linkPrefix) && l.Attrs().Group != retiredGroup {
			names = append(names, name)
		}
	}
	return names, nil
}

// ready tells whether packets can pass: the bridge is up, and the default route leads to a device with somebody
// behind it. A TAP loses its carrier when its program ends.
func (n *node) ready() error {
	bridge, err := n.route.LinkByIndex(n.bridge.Attrs().Index)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.bridge.Attrs().Name, err)
	}
	if bridge.Attrs().Flags&net.FlagUp == 0 {
		return fmt.Errorf("bridge %s is down", n.bridge.Attrs().Name)
	}
	routes, err := n.route.RouteList(nil, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list routes of the node: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		uplink, err := n.route.LinkByIndex(r.LinkIndex)
		if err != nil {
			return fmt.Errorf("find the user-mode network's device: %w", err)
		}
		if uplink.Attrs().RawFlags&unix.IFF_RUNNING == 0 {
			return fmt.Errorf("the user-mode network behind %s has ended", uplink.Attrs().Name)
		}
		return nil
	}
	return errors.New("the node has no default route: the user-mode network is not set up")
}
