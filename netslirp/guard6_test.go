package netslirp

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgedMark is in every frame that must not arrive. Its 14 bytes fill an option of neighbour discovery.
const forgedMark = "a forged frame"

// sixLab is two pods with IPv6, and the node, each with its addresses of both layers.
type sixLab struct {
	*lab
	thief, victim          pod
	thiefMAC, victimMAC    net.HardwareAddr
	gatewayMAC             net.HardwareAddr
	thiefLink, victimLink  string // link-local addresses
	gateway6, nobody       string
	allNodes, solicitsNode net.HardwareAddr
}

func newSixLab(t *testing.T, l *lab, n *Network) *sixLab {
	x := &sixLab{lab: l, thief: l.attach(n, "thief"), victim: l.attach(n, "victim"), gateway6: sixOf("1"), nobody: sixOf("99"),
		gatewayMAC: n.node.bridge.Attrs().HardwareAddr, allNodes: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1},
		solicitsNode: net.HardwareAddr{0x33, 0x33, 0xff, 0, 0, 1}}
	if x.thief.ip6 == "" {
		t.Fatal("pods have no IPv6 addresses")
	}
	x.thiefMAC, x.victimMAC = hardwareAddr(netip.MustParseAddr(x.thief.ip)), hardwareAddr(netip.MustParseAddr(x.victim.ip))
	x.thiefLink, x.victimLink = linkLocal(x.thiefMAC).String(), linkLocal(x.victimMAC).String()
	return x
}

// forged are what a pod with raw sockets can make of IPv6: none may get further than the node's end of its veth.
func (x *sixLab) forged() map[string][]byte {
	thief, victim, gateway := x.thiefMAC, x.victimMAC, x.gatewayMAC
	udp := func(to, from net.HardwareAddr, source, destination string) []byte {
		return frame6(to, from, source, destination, unix.IPPROTO_UDP, udp6(source, destination, 9, forgedMark))
	}
	nd := func(to, from net.HardwareAddr, source, destination string, message []byte) []byte {
		return frame6(to, from, source, destination, unix.IPPROTO_ICMPV6, icmp6(source, destination, message))
	}
	takeover := tells(x.nobody, thief) // of an address that was a pod's, or will be
	out := map[string][]byte{
		"to the victim's MAC":              udp(victim, thief, x.thief.ip6, x.victim.ip6),
		"to the victim's link-local":       udp(victim, thief, x.thiefLink, x.victimLink),
		"to all":                           udp(x.allNodes, thief, x.thief.ip6, "ff02::1"),
		"to a MAC that nobody has":         udp(net.HardwareAddr{2, 0, 0, 0, 0, 9}, thief, x.thief.ip6, x.victim.ip6),
		"from the victim":                  udp(gateway, thief, x.victim.ip6, x.victim.ip6),
		"from the victim, with its MAC":    udp(gateway, victim, x.victim.ip6, x.victim.ip6),
		"from the victim's link-local":     udp(gateway, thief, x.victimLink, x.victim.ip6),
		"from the gateway":                 udp(gateway, thief, x.gateway6, x.victim.ip6),
		"from a stranger":                  udp(gateway, thief, "2001:db8::1", x.victim.ip6),
		"from no address":                  udp(gateway, thief, "::", x.victim.ip6),
		"from loopback":                    udp(gateway, thief, "::1", x.victim.ip6),
		"DHCPv6: an answer to all":         dhcp6(x.allNodes, thief, x.thiefLink, "ff02::1"),
		"DHCPv6: an answer to the victim":  dhcp6(victim, thief, x.thiefLink, x.victimLink),
		"DHCPv6: an answer as the gateway": dhcp6(gateway, thief, x.gateway6, x.victim.ip6),

		"who has the gateway, from the victim":         nd(x.solicitsNode, thief, x.victim.ip6, "ff02::1:ff00:1", asks(x.gateway6, thief)),
		"who has the gateway, from no address":         nd(x.solicitsNode, thief, "::", "ff02::1:ff00:1", asks(x.gateway6, thief)),
		"who has the gateway, told the victim":         nd(victim, thief, x.thief.ip6, x.victim.ip6, asks(x.gateway6, thief)),
		"who has the gateway, behind an option":        hidden(x.solicitsNode, thief, x.victim.ip6, "ff02::1:ff00:1", asks(x.gateway6, thief)),
		"the gateway's address, told the victim":       nd(victim, thief, x.thief.ip6, x.victim.ip6, tells(x.gateway6, thief)),
		"the gateway's address, told to all":           nd(x.allNodes, thief, x.thief.ip6, "ff02::1", tells(x.gateway6, thief)),
		"the gateway's address, told as the gateway":   nd(x.allNodes, thief, x.gateway6, "ff02::1", tells(x.gateway6, thief)),
		"the victim's address, told the node":          nd(gateway, thief, x.thief.ip6, x.gateway6, tells(x.victim.ip6, thief)),
		"the victim's link-local, told the node":       nd(gateway, thief, x.thief.ip6, x.gateway6, tells(x.victimLink, thief)),
		"nobody's address, told the node":              nd(gateway, thief, x.thief.ip6, x.gateway6, takeover),
		"nobody's address, told from the link-local":   nd(gateway, thief, x.thiefLink, x.gateway6, takeover),
		"nobody's address, told behind an option":      hidden(gateway, thief, x.thief.ip6, x.gateway6, takeover),
		"nobody's address, told in a fragment":         fragment(gateway, thief, x.thief.ip6, x.gateway6, takeover),
		"a router's advertisement to all":              nd(x.allNodes, thief, x.thiefLink, "ff02::1", advertises()),
		"a router's advertisement to the victim":       nd(victim, thief, x.thiefLink, x.victimLink, advertises()),
		"a router's advertisement to the node":         nd(gateway, thief, x.thiefLink, "ff02::1", advertises()),
		"a router's advertisement behind an option":    hidden(gateway, thief, x.thiefLink, "ff02::1", advertises()),
		"a router's advertisement as the gateway":      nd(x.allNodes, thief, linkLocal(gateway).String(), "ff02::1", advertises()),
		"a redirect to the victim":                     nd(victim, thief, x.thiefLink, x.victim.ip6, redirects(x.gateway6, x.thiefLink)),
		"a redirect to the victim as the gateway":      nd(victim, thief, x.gateway6, x.victim.ip6, redirects(x.nobody, x.thiefLink)),
		"a redirect to the node":                       nd(gateway, thief, x.thiefLink, x.gateway6, redirects(x.victim.ip6, x.thiefLink)),
		"a redirect to the node, behind an option":     hidden(gateway, thief, x.thiefLink, x.gateway6, redirects(x.victim.ip6, x.thiefLink)),
		"a group's listener":                           nd(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 0x16}, thief, x.thiefLink, "ff02::16", listens("ff02::1:2")),
		"a group's listener, by the gateway's MAC":     nd(gateway, thief, x.victimLink, "ff02::16", listens("ff02::1:2")),
		"of IPv4's kind, with IPv6 in it":              retyped(udp(victim, thief, x.thief.ip6, x.victim.ip6), 0x08, 0x00),
		"of IPv4's kind, to the node, with IPv6 in it": retyped(udp(gateway, thief, x.victim.ip6, x.victim.ip6), 0x08, 0x00),
	}
	for _, name := range []string{"from the victim", "the gateway's address, told to all", "nobody's address, told the node"} {
		f := out[name]
		out[name+", in a VLAN"] = slices.Concat(f[:12], []byte{0x81, 0x00, 0, 1}, f[12:])
	}
	return out
}

// As TestForgedFramesAreDropped, by IPv6, where what tells who has an address is itself IPv6, and what tells of routers.
func TestForgedIPv6FramesAreDropped(t *testing.T) {
	l := newLab(t)
	n := l.open()
	x := newSixLab(t, l, n)
	x.temptNode(t, n)
	x.stale(t, n, x.nobody, x.victimLink, x.thiefLink)
	atVictim, atNode := sniff(t, x.victim.ns, podInterface), sniff(t, l.node, n.cfg.Bridge)
	raw := packetSocket(t, x.thief.ns, podInterface)
	forged := x.forged()
	for i, name := range slices.Sorted(maps.Keys(forged)) {
		must(t, raw.send(forged[name]))
		// The one that may pass, after it, by IPv6 as well.
		end := fmt.Sprintf("the end of frame %03d", i)
		must(t, raw.send(frame6(x.gatewayMAC, x.thiefMAC, x.thief.ip6, x.victim.ip6, unix.IPPROTO_UDP, udp6(x.thief.ip6, x.victim.ip6, 9, end))))
		for where, tap := range map[string]wireTap{"the victim": atVictim, "the node": atNode} {
			if seen := tap.until(t, end); bytes.Contains(seen, []byte(forgedMark)) {
				t.Errorf("a frame arrived at %s: %s", where, name)
			}
		}
	}
	for _, ip := range []string{x.nobody, x.victimLink} {
		if mac := x.neighbour(t, n, ip); !bytes.Equal(mac, bogusMAC) {
			t.Errorf("the node took %s for that of %s", mac, ip)
		}
	}
	x.wantUntempted(t, n)
	// What a pod says of its own address is heard: such frames as those above are good ones.
	must(t, raw.send(frame6(x.gatewayMAC, x.thiefMAC, x.thief.ip6, x.gateway6, unix.IPPROTO_ICMPV6,
		icmp6(x.thief.ip6, x.gateway6, tells(x.thiefLink, x.thiefMAC)))))
	eventually(t, "the node hears the pod", func() error {
		if mac := x.neighbour(t, n, x.thiefLink); !bytes.Equal(mac, x.thiefMAC) {
			return errors.New(mac.String())
		}
		return nil
	})
	// With the victim's MAC as the source of what may pass, the bridge has not moved.
	must(t, raw.send(frame6(x.gatewayMAC, x.victimMAC, x.thief.ip6, x.victim.ip6, unix.IPPROTO_UDP, udp6(x.thief.ip6, x.victim.ip6, 9, "moved"))))
	atVictim.until(t, "moved")
	serveTCP(t, x.victim.ns, ":80", "victim")
	wantAnswer(t, l.node, "tcp", join(x.victim.ip6, 80), "victim "+x.gateway6)
	wantAnswer(t, x.thief.ns, "tcp", join(x.victim.ip6, 80), "victim "+x.thief.ip6)
}

// Settings of the host's that new network namespaces may have from it (net.core.devconf_inherit_init_net) do not let
// pods tell the node, or each other, of routers.
func TestNobodyListensToRouters(t *testing.T) {
	l := newLab(t)
	heeding := []string{"accept_ra", "accept_redirects"}
	heed := func() error {
		return errors.Join(writeSysctl("ipv6/conf/default/accept_ra", "2"), writeSysctl("ipv6/conf/default/accept_redirects", "1"))
	}
	within(t, l.node, heed)
	n := l.open()
	p := pod{id: "a", ns: newNetNS(t)}
	within(t, p.ns, heed)
	_, err := n.Attach(t.Context(), AttachRequest{PodID: p.id, NetNS: p.ns})
	must(t, err)
	for _, name := range heeding {
		if got := sysctlOf(t, l.node, "ipv6/conf/"+n.cfg.Bridge+"/"+name); got != "0" {
			t.Errorf("%s of the node's bridge is %s", name, got)
		}
	}
	// Redirects count from the first hop's link-local address alone, which no route of a pod names.
	if got := sysctlOf(t, p.ns, "ipv6/conf/"+podInterface+"/accept_ra"); got != "0" {
		t.Errorf("accept_ra of the pod is %s", got)
	}
}

// bogusMAC is nobody's.
var bogusMAC = net.HardwareAddr{2, 0, 0, 0, 0, 0xee}

// stale enters the addresses as neighbours that the node has known, which an advertisement may correct.
func (x *sixLab) stale(t *testing.T, n *Network, addresses ...string) {
	t.Helper()
	within(t, x.node, func() error {
		var errs []error
		for _, ip := range addresses {
			neighbour := n.node.neighbour(netip.MustParseAddr(ip))
			neighbour.State, neighbour.HardwareAddr = netlink.NUD_STALE, bogusMAC
			errs = append(errs, netlink.NeighSet(neighbour))
		}
		return errors.Join(errs...)
	})
}

// neighbour is the MAC that the node knows the address by.
func (x *sixLab) neighbour(t *testing.T, n *Network, ip string) (mac net.HardwareAddr) {
	t.Helper()
	within(t, x.node, func() error {
		list, err := netlink.NeighList(n.node.bridge.Attrs().Index, unix.AF_INET6)
		for _, e := range list {
			if e.IP.String() == ip {
				mac = e.HardwareAddr
			}
		}
		return err
	})
	return mac
}

// temptNode lets the node listen to routers, so that nothing but the guard keeps it from doing so.
func (x *sixLab) temptNode(t *testing.T, n *Network) {
	t.Helper()
	within(t, x.node, func() error { return writeSysctl("ipv6/conf/"+n.cfg.Bridge+"/accept_ra", "2") })
}

// wantUntempted looks for what a false router has told.
func (x *sixLab) wantUntempted(t *testing.T, n *Network) {
	t.Helper()
	within(t, x.node, func() error {
		routes, err := netlink.RouteList(n.node.bridge, unix.AF_INET6)
		for _, r := range routes {
			if r.Dst == nil || r.Dst.IP.IsUnspecified() || strings.HasPrefix(r.Dst.String(), evilPrefix) {
				t.Errorf("the node has the route %s", r)
			}
		}
		return err
	})
}

func sysctlOf(t *testing.T, ns, name string) (value string) {
	t.Helper()
	within(t, ns, func() error {
		raw, err := os.ReadFile(sysctlPath(name))
		value = strings.TrimSpace(string(raw))
		return err
	})
	return value
}
