package netslirp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// firewallTable is ours alone: it is replaced as a whole, in one transaction, whenever a daemon starts.
const firewallTable = "coracle"

// Registers of nf_tables: reg1 is 16 bytes long, and reg1b its second 4 bytes, where the second part of a
// concatenation goes.
const (
	reg1  = unix.NFT_REG_1
	reg1b = unix.NFT_REG32_01
)

// firewall is the node's address translation, in nftables terms:
//
//	table ip coracle {
//	  map hostports { type inet_proto . inet_service : ipv4_addr . inet_service }
//	  set hairpin { type ipv4_addr . ipv4_addr }
//	  chain prerouting  { type nat hook prerouting priority dstnat;  fib daddr type local dnat to meta l4proto . th dport map @hostports }
//	  chain output      { type nat hook output priority dstnat;      fib daddr type local dnat to … }
//	  chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.88.0.0/16 oifname != "coracle0" masquerade
//	                                                                 ip saddr 127.0.0.0/8 oifname "coracle0" masquerade
//	                                                                 ip saddr . ip daddr @hairpin masquerade }
//	  chain loopback    { type filter hook prerouting priority raw;  iifname "coracle0" ip daddr 127.0.0.0/8 drop }
//	  chain foreignout  { type filter hook output priority mangle;     oifname "coracle0" meta l4proto tcp fib saddr type != local ct mark set 0x636f }
//	  chain foreignin   { type filter hook prerouting priority mangle; iifname "coracle0" ct mark 0x636f meta mark set 0x636f }
//	}
//
// A host port is there on the node's own 127.0.0.1 as well, where kubelet's probes and host-network pods look for it.
// The kernel lets such a packet leave, and its answer in, by a device with the sysctl route_localnet (routeLoopback
// sets it for the bridge), which would also let pods in to what listens on the node's loopback: the chain loopback keeps
// them out, before any translation. Packets from such an address the kernel refuses by itself (accept_local).
//
// The last two are for connections that the port driver makes with the address of a client outside (portChild):
// a pod's answers to it are marked, and a routing rule delivers what is marked to the node itself.
//
// A pod adds elements and never rules, so that its cost does not grow with the number of pods. hairpin holds a
// pod's address twice: a pod that reaches itself by its host port would drop a packet from its own address.
type firewall struct {
	ns     *os.File
	bridge string
}

// forward is one host port of a pod, as the node's namespace sees it.
type forward struct {
	protocol byte // IPPROTO_*
	port     uint16
	to       netip.AddrPort
}

// tables names the objects of the table, for one transaction.
type tables struct {
	table     *nftables.Table
	hostPorts *nftables.Set
	hairpin   *nftables.Set
}

func newTables() tables {
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: firewallTable}
	return tables{
		table: table,
		hostPorts: &nftables.Set{Table: table, Name: "hostports", IsMap: true, Concatenation: true,
			KeyType:  nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
			DataType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)},
		hairpin: &nftables.Set{Table: table, Name: "hairpin", Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr)},
	}
}

// transaction sends what fill adds, all or nothing. The socket is made for it by a thread inside the namespace,
// as one that met an error is out of step with its answers.
func (f *firewall) transaction(fill func(*nftables.Conn, tables) error) error {
	return inNetNS(f.ns, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		if err := fill(conn, newTables()); err != nil {
			return err
		}
		return conn.Flush()
	})
}

// replace makes the table hold exactly this.
func (f *firewall) replace(prefixes []netip.Prefix, forwards []forward) error {
	err := f.transaction(func(c *nftables.Conn, t tables) error {
		c.AddTable(t.table) // so that there is one to delete
		c.DelTable(t.table)
		c.AddTable(t.table)
		if err := errors.Join(c.AddSet(t.hostPorts, nil), c.AddSet(t.hairpin, nil)); err != nil {
			return err
		}
		f.addChains(c, t, prefixes)
		return addForwards(c, t, forwards)
	})
	if err != nil {
		return fmt.Errorf("write nftables table %s: %w", firewallTable, err)
	}
	return nil
}

func (f *firewall) addChains(c *nftables.Conn, t tables, prefixes []netip.Prefix) {
	chain := func(name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Table: t.table, Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: priority})
	}
	pre := chain("prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	out := chain("output", nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	post := chain(postrouting, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	c.AddRule(&nftables.Rule{Table: t.table, Chain: pre, Exprs: toHostPort(t)})
	c.AddRule(&nftables.Rule{Table: t.table, Chain: out, Exprs: toHostPort(t)})
	f.addMasquerade(c, t, post, prefixes)
	f.addLoopback(c, t)
	f.addForeign(c, t)
}

var loopback = netip.MustParsePrefix("127.0.0.0/8")

// fromBridge and toBridge tell the device that a packet came in by, or leaves by.
func (f *firewall) fromBridge() []expr.Any { return f.device(expr.MetaKeyIIFNAME, expr.CmpOpEq) }
func (f *firewall) toBridge() []expr.Any   { return f.device(expr.MetaKeyOIFNAME, expr.CmpOpEq) }

func (f *firewall) device(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: reg1}, &expr.Cmp{Op: op, Register: reg1, Data: interfaceName(f.bridge)}}
}

func (f *firewall) addLoopback(c *nftables.Conn, t tables) {
	chain := c.AddChain(&nftables.Chain{Table: t.table, Name: "loopback", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	exprs := append(f.fromBridge(), addressIn(daddrOffset, loopback)...)
	c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: append(exprs, &expr.Verdict{Kind: expr.VerdictDrop})})
}

// foreignMark is both the mark of connections with a foreign source address and the table that routes their
// answers.
const foreignMark = 0x636f

func (f *firewall) addForeign(c *nftables.Conn, t tables) {
	chain := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Table: t.table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityMangle})
	}
	mark := binaryutil.NativeEndian.PutUint32(foreignMark)
	c.AddRule(&nftables.Rule{Table: t.table, Chain: chain("foreignout", nftables.ChainHookOutput), Exprs: append(f.toBridge(),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		&expr.Immediate{Register: reg1, Data: mark},
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true},
	)})
	c.AddRule(&nftables.Rule{Table: t.table, Chain: chain("foreignin", nftables.ChainHookPrerouting), Exprs: append(f.fromBridge(),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: mark},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true}, // reg1 still holds the mark
	)})
}

const postrouting = "postrouting"

// masquerade replaces the prefixes whose packets leave by the node's address.
func (f *firewall) masquerade(prefixes []netip.Prefix) error {
	err := f.transaction(func(c *nftables.Conn, t tables) error {
		post := &nftables.Chain{Table: t.table, Name: postrouting}
		c.FlushChain(post)
		f.addMasquerade(c, t, post, prefixes)
		return nil
	})
	if err != nil {
		return fmt.Errorf("write masquerade to nftables table %s: %w", firewallTable, err)
	}
	return nil
}

func (f *firewall) addMasquerade(c *nftables.Conn, t tables, chain *nftables.Chain, prefixes []netip.Prefix) {
	for _, p := range prefixes {
		exprs := append(addressIn(saddrOffset, p), f.device(expr.MetaKeyOIFNAME, expr.CmpOpNeq)...)
		c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: append(exprs, &expr.Masq{})})
	}
	fromLoopback := append(addressIn(saddrOffset, loopback), f.toBridge()...)
	c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: append(fromLoopback, &expr.Masq{})})
	c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: []expr.Any{
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: saddrOffset, Len: 8}, // saddr and daddr
		&expr.Lookup{SourceRegister: reg1, SetName: t.hairpin.Name, SetID: t.hairpin.ID},
		&expr.Masq{},
	}})
}

// Offsets in the IPv4 header (RFC 791).
const (
	saddrOffset = 12
	daddrOffset = 16
)

// addressIn compares an address of the packet, masked, with the prefix.
func addressIn(offset uint32, p netip.Prefix) []expr.Any {
	mask := ^uint32(0) << (32 - p.Bits())
	if p.Bits() == 0 {
		mask = 0
	}
	return []expr.Any{
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.BigEndian.PutUint32(mask), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: p.Masked().Addr().AsSlice()},
	}
}

// toHostPort sends a packet for one of the node's addresses to the pod that has the port.
func toHostPort(t tables) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		&expr.Payload{DestRegister: reg1b, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, // destination port of TCP and UDP
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: t.hostPorts.Name, SetID: t.hostPorts.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg1, RegProtoMin: reg1b},
	}
}

func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// elements turns forwards into those of the map and of the set. Parts of a concatenation fill 4 bytes each.
func elements(forwards []forward) (ports, hairpin []nftables.SetElement) {
	seen := map[netip.Addr]bool{}
	for _, f := range forwards {
		to := f.to.Addr().AsSlice()
		key := append([]byte{f.protocol, 0, 0, 0}, binaryutil.BigEndian.PutUint16(f.port)...)
		value := append(append([]byte{}, to...), binaryutil.BigEndian.PutUint16(f.to.Port())...)
		ports = append(ports, nftables.SetElement{Key: append(key, 0, 0), Val: append(value, 0, 0)})
		if !seen[f.to.Addr()] {
			seen[f.to.Addr()] = true
			hairpin = append(hairpin, nftables.SetElement{Key: append(append([]byte{}, to...), to...)})
		}
	}
	return ports, hairpin
}

// addForwards sends few elements a message: a netlink attribute ends at 64 KiB.
func addForwards(c *nftables.Conn, t tables, forwards []forward) error {
	const batch = 256
	for len(forwards) > 0 {
		some := forwards[:min(batch, len(forwards))]
		forwards = forwards[len(some):]
		ports, hairpin := elements(some)
		if err := errors.Join(c.SetAddElements(t.hostPorts, ports), c.SetAddElements(t.hairpin, hairpin)); err != nil {
			return err
		}
	}
	return nil
}

// add is for the forwards of one pod.
func (f *firewall) add(forwards []forward) error {
	if len(forwards) == 0 {
		return nil
	}
	err := f.transaction(func(c *nftables.Conn, t tables) error { return addForwards(c, t, forwards) })
	if err != nil {
		return fmt.Errorf("add host ports to nftables table %s: %w", firewallTable, err)
	}
	return nil
}

// remove is for the forwards of one pod, and idempotent.
func (f *firewall) remove(forwards []forward) error {
	if len(forwards) == 0 {
		return nil
	}
	ports, hairpin := elements(forwards)
	err := f.transaction(func(c *nftables.Conn, t tables) error {
		return errors.Join(c.SetDeleteElements(t.hostPorts, ports), c.SetDeleteElements(t.hairpin, hairpin))
	})
	if errors.Is(err, unix.ENOENT) { // some are gone, and none was removed: one by one
		err = f.removeEach(ports, hairpin)
	}
	if err != nil {
		return fmt.Errorf("remove host ports from nftables table %s: %w", firewallTable, err)
	}
	return nil
}

func (f *firewall) removeEach(ports, hairpin []nftables.SetElement) error {
	one := func(pick func(tables) *nftables.Set, e nftables.SetElement) error {
		err := f.transaction(func(c *nftables.Conn, t tables) error {
			return c.SetDeleteElements(pick(t), []nftables.SetElement{e})
		})
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	var errs []error
	for _, e := range ports {
		errs = append(errs, one(func(t tables) *nftables.Set { return t.hostPorts }, e))
	}
	for _, e := range hairpin {
		errs = append(errs, one(func(t tables) *nftables.Set { return t.hairpin }, e))
	}
	return errors.Join(errs...)
}
