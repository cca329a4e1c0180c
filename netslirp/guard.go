package netslirp

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// guard keeps each pod to its own addresses, at the node's end of its veth, before anything looks at the frame. In
// nftables terms:
//
//	table bridge coracle {
//	  set pods4 { type ifname . ipv4_addr }
//	  set pods6 { type ifname . ipv6_addr }
//	  chain prerouting { type filter hook prerouting priority filter
//	    iifname != "pod*" accept
//	    ether daddr BRIDGE            ether type ip  iifname . ip saddr @pods4 accept
//	    ether daddr BRIDGE            ether type ip6 icmpv6 type nd-neighbor-advert iifname . ip6 saddr @pods6
//	                                                 iifname . icmpv6 taddr @pods6 accept
//	    icmpv6 type { nd-neighbor-advert, nd-router-advert, nd-redirect } drop
//	    ether daddr BRIDGE            ether type ip6 iifname . ip6 saddr @pods6 accept
//	    ether daddr BRIDGE            ether type arp iifname . arp saddr ip @pods4 accept
//	    ether daddr ff:ff:ff:ff:ff:ff ether type arp iifname . arp saddr ip @pods4 accept
//	    ether daddr & ff:ff:00:00:00:00 == 33:33:00:00:00:00 ether type ip6 icmpv6 type nd-neighbor-solicit
//	                                                 iifname . ip6 saddr @pods6 accept
//	    drop
//	  }
//	}
//
// So a pod sends to the gateway alone, as itself: there is no way around the node's routing to another pod, nobody
// else's address to send from or to answer for, and no other protocol. Together with the bridge's ports, which learn
// no MAC and are flooded with nothing (settlePort), no pod gets a frame that is not for it.
//
// By IPv6 what is said of addresses and routers is in packets of IPv6, from whatever address: a pod is heard on its own
// addresses alone, also where the message stands behind extension headers. One in several fragments the kernel drops
// (RFC 6980).
//
// A frame that br_netfilter has translated is beyond this hook, and the bridge may pass it on to another port.
type guard struct {
	rules  *ruleset
	mac    net.HardwareAddr // of the bridge
	absent error            // why this kernel has no such table, or nil
}

// bridgeFilter is where ebtables' filter and nft's "filter" stand among the hooks of a bridge (NF_BR_PRI_FILTER_BRIDGED).
const bridgeFilter = -200

// Offsets and sizes in a frame: RFC 894, RFC 826, RFC 4861.
const (
	etherTypeAt     = 12
	arpSenderAt     = 14
	icmpv6TypeAt    = 0
	nextHeaderAt    = 6 // of IPv6: an extension header is not taken for ICMPv6
	targetAt        = 8 // of the message by which neighbourTells
	routerTells     = 134
	neighbourAsks   = 135
	neighbourTells  = 136
	routerRedirects = 137
)

// guardTable names the objects, for one transaction.
type guardTable struct {
	table *nftables.Table
	pods  map[*family]*nftables.Set
}

func newGuardTable() guardTable {
	table := &nftables.Table{Family: nftables.TableFamilyBridge, Name: firewallTable}
	set := func(name string, f *family) *nftables.Set {
		return &nftables.Set{Table: table, Name: name, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, f.addr)}
	}
	return guardTable{table: table, pods: map[*family]*nftables.Set{ipv4: set("pods4", ipv4), ipv6: set("pods6", ipv6)}}
}

func (g *guard) transaction(fill func(*nftables.Conn, guardTable) error) error {
	return g.rules.transaction(func(c *nftables.Conn) error { return fill(c, newGuardTable()) })
}

// replace makes the table hold exactly these pods. A kernel without nftables for bridges is remembered as such.
func (g *guard) replace(pods []*record) error {
	err := g.transaction(func(c *nftables.Conn, t guardTable) error {
		c.AddTable(t.table)
		c.DelTable(t.table)
		c.AddTable(t.table)
		for _, f := range []*family{ipv4, ipv6} {
			if err := c.AddSet(t.pods[f], nil); err != nil {
				return err
			}
		}
		g.addRules(c, t)
		return eachPod(pods, t, c.SetAddElements)
	})
	for _, unknown := range []error{unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.ENOENT} {
		if errors.Is(err, unknown) {
			g.absent = fmt.Errorf("this kernel has no nftables for bridges: %w", err)
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("write nftables table bridge %s: %w", firewallTable, err)
	}
	return nil
}

// allow lets the pod send from its addresses; forbid takes that back, and is idempotent.
func (g *guard) allow(r *record) error {
	if g.absent != nil {
		return nil
	}
	err := g.transaction(func(c *nftables.Conn, t guardTable) error { return eachPod([]*record{r}, t, c.SetAddElements) })
	if err != nil {
		return fmt.Errorf("let %s send from its addresses: %w", r.Link, err)
	}
	return nil
}

func (g *guard) forbid(r *record) error {
	if g.absent != nil {
		return nil
	}
	err := g.transaction(func(c *nftables.Conn, t guardTable) error { return eachPod([]*record{r}, t, c.SetDeleteElements) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("keep %s from sending: %w", r.Link, err)
	}
	return nil
}

// eachPod hands a pod's few elements to do. A message each keeps below netlink's 64 KiB.
func eachPod(pods []*record, t guardTable, do func(*nftables.Set, []nftables.SetElement) error) error {
	for _, r := range pods {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, r.Link)
		for _, a := range r.sources() {
			element := nftables.SetElement{Key: concat(name, a.AsSlice())}
			if err := do(t.pods[familyOf(a)], []nftables.SetElement{element}); err != nil {
				return err
			}
		}
	}
	return nil
}

// sources are the addresses that the pod may send from: its own, and the one of the link that the kernel makes of the
// MAC for a pod with IPv6, from which it asks whether its gateway is still there (RFC 4861).
func (r *record) sources() []netip.Addr {
	var out []netip.Addr
	six := false
	for _, a := range r.Addresses {
		out = append(out, a.Addr())
		six = six || familyOf(a.Addr()) == ipv6
	}
	if six {
		out = append(out, linkLocal(hardwareAddr(r.ip())))
	}
	return out
}

// linkLocal is the address of RFC 4291, appendix A.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
}

func (g *guard) addRules(c *nftables.Conn, t guardTable) {
	priority := nftables.ChainPriority(bridgeFilter)
	chain := c.AddChain(&nftables.Chain{Table: t.table, Name: "prerouting", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: &priority})
	rule := func(kind expr.VerdictKind, parts ...[]expr.Any) {
		var all []expr.Any
		for _, part := range parts {
			all = append(all, part...)
		}
		c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: append(all, verdict(kind)...)})
	}
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	toNode := field(expr.PayloadBaseLLHeader, 0, g.mac)
	toAll := field(expr.PayloadBaseLLHeader, 0, bytes.Repeat([]byte{0xff}, 6))
	toGroup := field(expr.PayloadBaseLLHeader, 0, []byte{0x33, 0x33})
	asks := append(field(network, nextHeaderAt, []byte{unix.IPPROTO_ICMPV6}), field(transport, icmpv6TypeAt, []byte{neighbourAsks})...)

	rule(expr.VerdictAccept, []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register(0), Data: []byte(linkPrefix)}})
	rule(expr.VerdictAccept, toNode, etherType(unix.ETH_P_IP), t.fromPod(ipv4, network, ipv4.saddr))
	rule(expr.VerdictAccept, toNode, etherType(unix.ETH_P_IPV6), icmpv6(neighbourTells), t.fromPod(ipv6, network, ipv6.saddr),
		t.fromPod(ipv6, transport, targetAt))
	for _, kind := range []byte{neighbourTells, routerTells, routerRedirects} {
		rule(expr.VerdictDrop, icmpv6(kind))
	}
	rule(expr.VerdictAccept, toNode, etherType(unix.ETH_P_IPV6), t.fromPod(ipv6, network, ipv6.saddr))
	rule(expr.VerdictAccept, toNode, etherType(unix.ETH_P_ARP), t.fromPod(ipv4, network, arpSenderAt))
	rule(expr.VerdictAccept, toAll, etherType(unix.ETH_P_ARP), t.fromPod(ipv4, network, arpSenderAt))
	rule(expr.VerdictAccept, toGroup, etherType(unix.ETH_P_IPV6), asks, t.fromPod(ipv6, network, ipv6.saddr))
	rule(expr.VerdictDrop)
}

// fromPod matches a frame of which the link and the address at that place of a header are one pod's.
func (t guardTable) fromPod(f *family, base expr.PayloadBase, offset uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register(0)},
		&expr.Payload{DestRegister: register(unix.IFNAMSIZ / 4), Base: base, Offset: offset, Len: f.size},
		&expr.Lookup{SourceRegister: register(0), SetName: t.pods[f].Name, SetID: t.pods[f].ID},
	}
}

func etherType(kind uint16) []expr.Any {
	return field(expr.PayloadBaseLLHeader, etherTypeAt, binaryutil.BigEndian.PutUint16(kind))
}

// field matches what a header has at a place.
func field(base expr.PayloadBase, offset uint32, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: register(0), Base: base, Offset: offset, Len: uint32(len(value))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: value},
	}
}
