package netslirp

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// linkPrefix and 12 hex digits name the node's end of a pod's veth: 15 bytes, the most that Linux takes. The pod's
// id is the link's alias, for people, and for a daemon that has lost the pod's record.
const linkPrefix = "pod"

// newLink returns a name that no link had or will have, so that a link that is still being deleted is never
// mistaken for a new pod's.
func newLink() string {
	raw := make([]byte, 6)
	rand.Read(raw) // never fails (crypto/rand)
	return linkPrefix + hex.EncodeToString(raw)
}

// hardwareAddr derives a MAC from the address, as CNI's bridge plugin does. An address that is given again thus
// answers at the MAC that neighbour caches already hold for it. The checksum of an IPv6 address is different for
// any two that differ in 32 bits next to each other, as those of one pod CIDR do.
func hardwareAddr(ip netip.Addr) net.HardwareAddr {
	b := ip.AsSlice()
	if ip.Is6() {
		sum := crc32.ChecksumIEEE(b)
		b = []byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)}
	}
	return append(net.HardwareAddr{0x0a, 0x58}, b...) // 0x0a: locally administered, unicast
}

// plug links the pod's namespace to the bridge and configures its end. refused are addresses of the record that the
// pod's namespace does not take: those of IPv6, where a sysctl of the pod disables it.
func (n *node) plug(r *record, pod *os.File) (refused []netip.Prefix, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex = r.Link, n.bridge.Attrs().MTU, n.bridge.Attrs().Index
	attrs.Flags = net.FlagUp
	// A veth uses one queue until somebody sets more. The kernel would make one of each kind for every CPU, which
	// are objects in /sys: a tenth of the time of an Attach on 2 CPUs, and more on more.
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerNamespace = podInterface, uint32(attrs.MTU), netlink.NsFd(int(pod.Fd()))
	veth.PeerHardwareAddr = hardwareAddr(r.ip())
	if err := n.route.LinkAdd(veth); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make veth %s: the pod's namespace has an %s already: %w", r.Link, podInterface, err)
		}
		return nil, fmt.Errorf("make veth %s: %w", r.Link, err)
	}
	crash.Point("net/link-made")
	if err := n.settlePort(r.Link, veth.Attrs().Index); err != nil {
		return nil, err
	}
	if err := n.route.LinkSetAlias(veth, r.PodID); err != nil {
		return nil, fmt.Errorf("set alias of %s: %w", r.Link, err)
	}
	crash.Point("net/link-named")
	err = inNetNS(pod, func() error {
		refused, err = configurePod(r)
		return err
	})
	if err != nil {
		return nil, err
	}
	crash.Point("net/pod-configured")
	return refused, n.introduce(r, veth.Attrs().Index, veth.PeerHardwareAddr)
}

// settlePort sets how the bridge treats the link. It learns no MAC from it, so that a pod cannot draw another's frames
// to itself, and floods nothing to it: it knows where each MAC is (introduce). Where br_netfilter is on, a Service's
// DNAT happens inside the bridge and may lead back to the same port, which takes the hairpin mode.
func (n *node) settlePort(link string, index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = n.raw
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	port.AddRtAttr(nl.IFLA_BRPORT_MODE, []byte{1}) // hairpin
	for _, attr := range []int{nl.IFLA_BRPORT_LEARNING, nl.IFLA_BRPORT_UNICAST_FLOOD, nl.IFLA_BRPORT_MCAST_FLOOD, nl.IFLA_BRPORT_BCAST_FLOOD} {
		port.AddRtAttr(attr, []byte{0})
	}
	req.AddData(port)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("set %s up as a port of %s: %w", link, n.bridge.Attrs().Name, err)
	}
	return nil
}

// introduce tells the bridge where the pod's MAC is, and the node that the pod's addresses have it, for good: neither
// asks, and so nobody else can answer.
func (n *node) introduce(r *record, link int, mac net.HardwareAddr) error {
	err := n.route.NeighSet(&netlink.Neigh{LinkIndex: link, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
		State: netlink.NUD_NOARP, HardwareAddr: mac})
	if err != nil {
		return fmt.Errorf("tell %s where %s is: %w", n.bridge.Attrs().Name, mac, err)
	}
	for _, a := range r.Addresses {
		neighbour := n.neighbour(a.Addr())
		neighbour.State, neighbour.HardwareAddr = netlink.NUD_PERMANENT, mac
		if err := n.route.NeighSet(neighbour); err != nil {
			return fmt.Errorf("set neighbour %s: %w", a.Addr(), err)
		}
	}
	return nil
}

func (n *node) neighbour(ip netip.Addr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: n.bridge.Attrs().Index, Family: familyOf(ip).number, IP: ip.AsSlice()}
}

// neighbours are the addresses of which the node was told who has them: by introduce.
func (n *node) neighbours() (told []netip.Addr, err error) {
	list, err := n.route.NeighList(n.bridge.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	for _, x := range list {
		if ip, ok := netip.AddrFromSlice(x.IP); ok && x.State == netlink.NUD_PERMANENT && !ip.IsMulticast() {
			told = append(told, ip.Unmap())
		}
	}
	return told, nil
}

// forgetNeighbours undoes that part of introduce which does not go with the link. It is idempotent.
func (n *node) forgetNeighbours(addresses []netip.Prefix) error {
	for _, a := range addresses {
		if err := n.route.NeighDel(n.neighbour(a.Addr())); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("forget neighbour %s: %w", a.Addr(), err)
		}
	}
	return nil
}

// configurePod runs on a thread inside the pod's namespace.
func configurePod(r *record) (refused []netip.Prefix, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket of the pod: %w", err)
	}
	defer h.Close()
	const loIndex = 1 // in every network namespace
	if err := h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loIndex}}); err != nil {
		return nil, fmt.Errorf("set lo of the pod up: %w", err)
	}
	link, err := h.LinkByName(podInterface)
	if err != nil {
		return nil, fmt.Errorf("find %s of the pod: %w", podInterface, err)
	}
	if err := quietIPv6(); err != nil {
		return nil, err
	}
	for _, a := range r.Addresses {
		err := h.AddrAdd(link, podAddress(a.Addr()))
		if familyOf(a.Addr()) == ipv6 && errors.Is(err, unix.EACCES) {
			refused = append(refused, a)
		} else if err != nil {
			return nil, fmt.Errorf("give %s the address %s: %w", podInterface, a.Addr(), err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", podInterface, err)
	}
	for _, a := range r.Addresses {
		if len(refused) > 0 && a == refused[0] {
			continue
		}
		if err := routePod(h, link.Attrs().Index, a); err != nil {
			return nil, err
		}
	}
	return refused, nil
}

// quietIPv6 makes the pod's interface use its addresses at once, without the second of duplicate address detection:
// nobody else can have them. And it keeps the pod from taking addresses and routes from a router's advertisements,
// which on this bridge only another pod can send. A kernel without IPv6 has no such files.
func quietIPv6() error {
	for _, name := range []string{"accept_dad", "accept_ra"} {
		err := setSysctl("ipv6/conf/"+podInterface+"/"+name, "0")
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EROFS) {
			return err
		}
	}
	return nil
}

// podAddress is the address as the pod has it: alone, with no network around it.
func podAddress(ip netip.Addr) *netlink.Addr {
	addr := &netlink.Addr{IPNet: ipNet(hostPrefix(ip))}
	if familyOf(ip) == ipv6 {
		addr.Flags = unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE
	}
	return addr
}

// routePod leads everything through the gateway: for IPv4, and for an IPv6 address that the rest of the world could
// route. With an IPv6 address of a private network a pod reaches private networks only, as those of pods and
// Services are: to send the rest to a node without IPv6 uplink would cost a program a second for each address of
// the world that it tries, where "network is unreachable" costs nothing.
func routePod(h *netlink.Handle, index int, a netip.Prefix) error {
	gateway := gatewayOf(a)
	to := familyOf(a.Addr()).all
	if localIPv6.Contains(a.Addr()) {
		to = localIPv6
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: index, Dst: ipNet(hostPrefix(gateway)), Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("add route to the gateway %s: %w", gateway, err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: index, Dst: ipNet(to), Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("add route to %s by %s: %w", to, gateway, err)
	}
	return nil
}

// unplug sets the link down, after which no frame passes and nothing answers at its address; and retires it. Deleting it takes 30 ms, this 0.2: the reaper does the former. It is
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
		crash.Point("net/link-retired")
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

// links lists the pods' links, and the pod of each where the link says it.
func (n *node) links() (map[string]string, error) {
	all, err := consistent(n.route.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links of the node: %w", err)
	}
	owners := map[string]string{}
	for _, l := range all {
		name := l.Attrs().Name
		if l.Type() == "veth" && strings.HasPrefix(name, linkPrefix) && l.Attrs().Group != retiredGroup {
			owners[name] = l.Attrs().Alias
		}
	}
	return owners, nil
}
