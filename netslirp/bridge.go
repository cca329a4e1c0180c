package netslirp

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// node is the kernel's side: the node's network namespace, its bridge and the links of the pods.
type node struct {
	ns     *os.File
	route  *netlink.Handle          // its socket is inside ns; safe for use by several goroutines
	raw    map[int]*nl.SocketHandle // the like, for messages that netlink has no function for
	bridge netlink.Link
	reaper *reaper
	noIPv6 error // why there is no IPv6 here, or nil
}

// openNode enters the namespace at path and lets it forward packets.
func openNode(path string, mtu int) (*node, error) {
	ns, err := openNetNS(path)
	if err != nil {
		return nil, err
	}
	n := &node{ns: ns}
	if err := inNetNS(n.ns, func() error { return n.setUp(mtu) }); err != nil {
		return nil, errors.Join(err, n.close())
	}
	n.reaper.kick() // what a crash left retired
	return n, nil
}

// setUp runs on a thread inside the namespace: /proc/sys/net shows that of the thread that opens it.
func (n *node) setUp(mtu int) (err error) {
	if n.route, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink socket of the node: %w", err)
	}
	// Both "none": the socket is made on this thread, where it is, and no namespace is entered.
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink socket of the node: %w", err)
	}
	n.raw = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}
	if n.reaper, err = startReaper(); err != nil {
		return err
	}
	if err := writeSysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if n.noIPv6 = checkIPv6(mtu); n.noIPv6 == nil {
		if err := writeSysctl("ipv6/conf/all/forwarding", "1"); err != nil {
			return err
		}
	}
	for _, f := range n.families() {
		if err := routeForeign(n.route, f); err != nil {
			return err
		}
	}
	return nil
}

// families are the versions of IP that this node has.
func (n *node) families() []*family {
	if n.noIPv6 != nil {
		return []*family{ipv4}
	}
	return []*family{ipv4, ipv6}
}

// checkIPv6 tells why the calling thread's namespace cannot have IPv6.
func checkIPv6(mtu int) error {
	const leastMTU = 1280 // RFC 8200; below it the kernel takes IPv6 from an interface
	disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("this kernel has no IPv6 (no /proc/sys/net/ipv6)")
	case err != nil:
		return fmt.Errorf("whether there is IPv6 cannot be told: %w", err)
	case strings.TrimSpace(string(disabled)) != "0":
		return errors.New("IPv6 is disabled in new network namespaces of this host (net.ipv6.conf.all.disable_ipv6)")
	case mtu < leastMTU:
		return fmt.Errorf("IPv6 needs an MTU of %d, and network.mtu is %d", leastMTU, mtu)
	}
	return nil
}

// layBridge makes what is missing of the bridge.
func (n *node) layBridge(name string, mtu int, mac net.HardwareAddr) error {
	return inNetNS(n.ns, func() (err error) {
		if n.bridge, err = ensureBridge(n.route, name, mtu, mac); err != nil {
			return err
		}
		if n.noIPv6 == nil {
			if err := quietBridge(name); err != nil {
				return err
			}
		}
		if err := n.route.LinkSetUp(n.bridge); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
		// Pods of one bridge reach each other through it: do not tell them of a shorter way. The kernel
		// sends redirects where either of the two says so. For IPv6 the firewall drops them.
		return errors.Join(writeSysctl("ipv4/conf/all/send_redirects", "0"),
			writeSysctl("ipv4/conf/"+name+"/send_redirects", "0"))
	})
}

// quietBridge spares the bridge duplicate address detection, since nobody else can have its addresses; and it keeps the
// node from hearing of routers there, whatever the host's settings are, which new namespaces may have from it: behind the
// bridge are pods alone.
func quietBridge(name string) error {
	var errs []error
	for _, setting := range []string{"accept_dad", "accept_ra", "accept_redirects"} {
		errs = append(errs, writeSysctl("ipv6/conf/"+name+"/"+setting, "0"))
	}
	return errors.Join(errs...)
}

// openLoopback lets the node reach host ports at its 127.0.0.1 (see firewall).
func (n *node) openLoopback() error {
	return inNetNS(n.ns, func() error { return writeSysctl("ipv4/conf/"+n.bridge.Attrs().Name+"/route_localnet", "1") })
}

func (n *node) close() error {
	if n.reaper != nil {
		n.reaper.close()
	}
	if n.route != nil {
		n.route.Close()
	}
	for _, handle := range n.raw {
		handle.Close()
	}
	return n.ns.Close()
}

// writeSysctl sets net.<name> of the calling thread's namespace.
func writeSysctl(name, value string) error {
	if have, err := os.ReadFile(sysctlPath(name)); err == nil && strings.TrimSpace(string(have)) == value {
		return nil // also where /proc/sys is read-only
	}
	return setSysctl(name, value)
}

// setSysctl writes without a look, where the value is known to be another.
func setSysctl(name, value string) error {
	f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("set sysctl net.%s=%s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

func sysctlPath(name string) string { return "/proc/sys/net/" + name }

func ensureBridge(h *netlink.Handle, name string, mtu int, mac net.HardwareAddr) (netlink.Link, error) {
	var missing netlink.LinkNotFoundError
	link, err := h.LinkByName(name)
	if errors.As(err, &missing) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		// Without an address of its own a bridge takes the lowest of its ports', and changes it as pods come and go.
		attrs.HardwareAddr = mac
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
	return link, nil
}

// routeForeign delivers what the firewall marks to the node itself, whatever its address: "ip rule add fwmark M
// lookup M" and "ip route add local default dev lo table M". It is idempotent.
func routeForeign(h *netlink.Handle, f *family) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo of the node: %w", err)
	}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(f.all), Table: foreignMark,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}); err != nil {
		return fmt.Errorf("add route for foreign source addresses: %w", err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = f.number, foreignMark, foreignMark, 100
	if err := h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add routing rule for foreign source addresses: %w", err)
	}
	return nil
}

// checkGateways refuses pools that overlap a network of another device of the node.
func (n *node) checkGateways(pools []*pool) error {
	for _, p := range pools {
		addrs, err := n.addresses(familyOf(p.gateway))
		if err != nil {
			return err
		}
		for _, a := range addrs {
			other := prefixOf(a)
			if a.LinkIndex != n.bridge.Attrs().Index && other.Masked().Overlaps(p.prefix) {
				return fmt.Errorf("pod CIDR %s overlaps %s, which the node has: %w", p.prefix, other.Masked(), ErrInvalid)
			}
		}
	}
	return nil
}

// addGateway gives the bridge the pool's first address, and tells whether it did not have it. It is idempotent.
func (n *node) addGateway(p *pool) (fresh bool, err error) {
	family := familyOf(p.gateway)
	addrs, err := n.addresses(family)
	if err != nil {
		return false, err
	}
	gateway := p.gatewayAddr()
	had := slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		// IPv6 knows an address once, whatever its network is.
		return a.LinkIndex == n.bridge.Attrs().Index && addrOf(a.IP) == p.gateway && (family == ipv6 || prefixOf(a).Bits() == p.prefix.Bits())
	})
	if err := n.route.AddrReplace(n.bridge, gateway); err != nil {
		return false, fmt.Errorf("give %s the address %s: %w", n.bridge.Attrs().Name, gateway.IPNet, err)
	}
	return !had, nil
}

// dropGateway takes the pool's first address from the bridge.
func (n *node) dropGateway(p *pool) error {
	gateway := p.gatewayAddr()
	if err := n.route.AddrDel(n.bridge, gateway); err != nil {
		return fmt.Errorf("take the address %s from %s: %w", gateway.IPNet, n.bridge.Attrs().Name, err)
	}
	return nil
}

func (p *pool) gatewayAddr() *netlink.Addr {
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(p.gateway, p.prefix.Bits()))}
	if familyOf(p.gateway) == ipv6 {
		addr.Flags = unix.IFA_F_NODAD
	}
	return addr
}

// addresses are those of every device of the node.
func (n *node) addresses(f *family) ([]netlink.Addr, error) {
	addrs, err := consistent(func() ([]netlink.Addr, error) { return n.route.AddrList(nil, f.number) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of the node: %w", err)
	}
	return addrs, nil
}

// prefixOf keeps the host bits.
func prefixOf(a netlink.Addr) netip.Prefix {
	ones, _ := a.Mask.Size()
	return netip.PrefixFrom(addrOf(a.IP), ones)
}

// has tells whether the address is the node's own, other than by its loopback device.
func (n *node) has(ip netip.Addr) bool {
	ip = ip.Unmap()
	if ip.IsUnspecified() || ip.IsLoopback() {
		return false
	}
	addrs, err := n.addresses(familyOf(ip))
	return err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return addrOf(a.IP) == ip })
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
	routes, err := consistent(func() ([]netlink.Route, error) { return n.route.RouteList(nil, unix.AF_INET) })
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
		if uplink.Attrs().RawFlags&unix.IFF_LOWER_UP == 0 {
			return fmt.Errorf("the user-mode network behind %s has ended and is started again within %s; where it is not, start the node "+
				"again (coracle down, then coracle up)", uplink.Attrs().Name, slirpMostPause)
		}
		return nil
	}
	return errors.New("the node has no default route: the user-mode network is not set up, or is just being started again")
}
