package netslirp

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// register names a register of nf_tables by its first word of 4 bytes; what is loaded there may be longer.
func register(word uint32) uint32 { return unix.NFT_REG32_00 + word }

// words is how many registers an address fills.
func (f *family) words() uint32 { return f.size / 4 }

// foreignMark is both the mark of connections with a foreign source address and the table that routes their
// answers.
const foreignMark = 0x636f

const postrouting = "postrouting"

func (f *firewall) addChains(c *nftables.Conn, t tables, prefixes []netip.Prefix) {
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Table: t.table, Name: name, Type: kind, Hooknum: hook, Priority: priority})
	}
	rule := func(chain *nftables.Chain, parts ...[]expr.Any) {
		var all []expr.Any
		for _, part := range parts {
			all = append(all, part...)
		}
		c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: all})
	}
	const nat, filter = nftables.ChainTypeNAT, nftables.ChainTypeFilter
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		in := chain(name, nat, hook, nftables.ChainPriorityNATDest)
		if t.family == ipv6 { // from a pod the kernel takes no such packet
			rule(in, t.addressIn(t.daddr(), t.loopback), verdict(expr.VerdictAccept))
		}
		rule(in, t.toHostPortAt())
		rule(in, t.toHostPort())
	}
	f.addMasquerade(c, t, chain(postrouting, nat, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), prefixes)

	out := chain("foreignout", filter, nftables.ChainHookOutput, nftables.ChainPriorityMangle)
	rule(out, f.toBridge(), tcp(), fib(expr.Fib{FlagSADDR: true}, expr.CmpOpNeq, unix.RTN_LOCAL), setMark())
	in := chain("foreignin", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle)
	rule(in, f.fromBridge(), copyMark())

	if t.family == ipv4 {
		guard := chain("loopback", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
		for _, offset := range []uint32{t.saddr, t.daddr()} {
			rule(guard, f.fromBridge(), t.addressIn(offset, t.loopback), verdict(expr.VerdictDrop))
		}
		return
	}
	nowhere := chain("nowhere", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityFilter)
	rule(nowhere, f.fromBridge(), tcp(), fib(expr.Fib{FlagDADDR: true, FlagMARK: true}, expr.CmpOpEq, unix.RTN_UNREACHABLE), reset())
	redirects := chain("redirects", filter, nftables.ChainHookOutput, nftables.ChainPriorityFilter)
	rule(redirects, f.toBridge(), icmpv6(routerRedirects), verdict(expr.VerdictDrop)) // of a shorter way, as pods have
}

func (f *firewall) addMasquerade(c *nftables.Conn, t tables, chain *nftables.Chain, prefixes []netip.Prefix) {
	rule := func(exprs []expr.Any) {
		c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: append(exprs, &expr.Masq{})})
	}
	for _, p := range prefixes {
		if familyOf(p.Addr()) == t.family {
			rule(append(t.addressIn(t.saddr, p), iface(expr.MetaKeyOIFNAME, expr.CmpOpNeq, f.bridge)...))
		}
	}
	if t.family == ipv4 {
		rule(append(t.addressIn(t.saddr, t.loopback), f.toBridge()...))
	}
	rule([]expr.Any{
		&expr.Payload{DestRegister: register(0), Base: expr.PayloadBaseNetworkHeader, Offset: t.saddr, Len: 2 * t.size},
		&expr.Lookup{SourceRegister: register(0), SetName: t.hairpin.Name, SetID: t.hairpin.ID},
	})
}

// toHostPort sends a packet for any of the node's addresses to the pod that has the port at all of them.
func (t tables) toHostPort() []expr.Any {
	return append(fib(expr.Fib{FlagDADDR: true}, expr.CmpOpEq, unix.RTN_LOCAL), append(t.port(0), t.translate(t.hostPorts)...)...)
}

// toHostPortAt sends it to the pod that has the port at that address.
func (t tables) toHostPortAt() []expr.Any {
	exprs := append(fib(expr.Fib{FlagDADDR: true}, expr.CmpOpEq, unix.RTN_LOCAL),
		&expr.Payload{DestRegister: register(0), Base: expr.PayloadBaseNetworkHeader, Offset: t.daddr(), Len: t.size})
	return append(exprs, append(t.port(t.words()), t.translate(t.hostPortsAt)...)...)
}

// port loads the protocol and its destination port, which TCP and UDP have at the same place.
func (t tables) port(word uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register(word)},
		&expr.Payload{DestRegister: register(word + 1), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// translate looks what was loaded up and sends the packet to what it finds: an address, and a port in the word after.
func (t tables) translate(set *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Lookup{SourceRegister: register(0), DestRegister: register(0), IsDestRegSet: true, SetName: set.Name, SetID: set.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(t.number), RegAddrMin: register(0), RegProtoMin: register(t.words())},
	}
}

// addressIn matches an address of the packet that is in the prefix.
func (t tables) addressIn(offset uint32, p netip.Prefix) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: register(0), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: t.size},
		&expr.Bitwise{SourceRegister: register(0), DestRegister: register(0), Len: t.size, Mask: ipNet(p).Mask, Xor: make([]byte, t.size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: p.Masked().Addr().AsSlice()},
	}
}

// fib matches the kind (RTN_*) of route that the address which of names would have.
func fib(of expr.Fib, op expr.CmpOp, kind uint32) []expr.Any {
	of.Register, of.ResultADDRTYPE = register(0), true
	return []expr.Any{&of, &expr.Cmp{Op: op, Register: register(0), Data: binaryutil.NativeEndian.PutUint32(kind)}}
}

func (f *firewall) fromBridge() []expr.Any { return iface(expr.MetaKeyIIFNAME, expr.CmpOpEq, f.bridge) }
func (f *firewall) toBridge() []expr.Any   { return iface(expr.MetaKeyOIFNAME, expr.CmpOpEq, f.bridge) }

func iface(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{&expr.Meta{Key: key, Register: register(0)}, &expr.Cmp{Op: op, Register: register(0), Data: padded}}
}

func tcp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: []byte{unix.IPPROTO_TCP}},
	}
}

// icmpv6 matches a message of that type, also behind extension headers.
func icmpv6(kind byte) []expr.Any {
	return append([]expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: []byte{unix.IPPROTO_ICMPV6}},
	}, field(expr.PayloadBaseTransportHeader, icmpv6TypeAt, []byte{kind})...)
}

// setMark marks the connection.
func setMark() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: register(0), Data: binaryutil.NativeEndian.PutUint32(foreignMark)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: register(0), SourceRegister: true},
	}
}

// copyMark gives the packet of a marked connection the same mark.
func copyMark() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: register(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: binaryutil.NativeEndian.PutUint32(foreignMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register(0), SourceRegister: true}, // it still holds the mark
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }
