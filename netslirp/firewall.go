package netslirp

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// firewallTable is ours alone, once for each version of IP: it is replaced as a whole, in one transaction, whenever
// a daemon starts.
const firewallTable = "coracle"

// firewall is the node's address translation, in nftables terms, here for IPv4:
//
//	table ip coracle {
//	  map hostports    { type inet_proto . inet_service : ipv4_addr . inet_service }
//	  map hostports_at { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//	  set hairpin      { type ipv4_addr . ipv4_addr }
//	  chain prerouting  { type nat hook prerouting priority dstnat;  fib daddr type local dnat to ip daddr . meta l4proto . th dport map @hostports_at
//	                                                                 fib daddr type local dnat to meta l4proto . th dport map @hostports }
//	  chain output      { type nat hook output priority dstnat;      the same }
//	  chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.88.0.0/16 oifname != "coracle0" masquerade
//	                                                                 ip saddr 127.0.0.0/8 oifname "coracle0" masquerade
//	                                                                 ip saddr . ip daddr @hairpin masquerade }
//	  chain foreignout  { type filter hook output priority mangle;     oifname "coracle0" meta l4proto tcp fib saddr type != local ct mark set 0x636f }
//	  chain foreignin   { type filter hook prerouting priority mangle; iifname "coracle0" ct mark 0x636f meta mark set 0x636f }
//	  chain loopback    { type filter hook prerouting priority raw;    iifname "coracle0" ip saddr 127.0.0.0/8 drop
//	                                                                   iifname "coracle0" ip daddr 127.0.0.0/8 drop }
//	}
//
// foreignout and foreignin are for connections that the port driver makes with the address of a client outside
// (portChild): a pod's answers to it are marked, and a routing rule delivers what is marked to the node itself.
//
// A host port answers at the node's 127.0.0.1 too, where a program of the node looks for it. The kernel routes such
// packets off the loopback device only under route_localnet (node.openLoopback), which would let pods reach
// whatever listens there: the chain loopback keeps them out. IPv6 has no such way: its first two chains begin with
// "ip6 daddr ::1 accept", so that a program is refused there and not left waiting. It has two other chains:
//
//	chain nowhere   { type filter hook prerouting priority filter; iifname "coracle0" meta l4proto tcp fib daddr . mark type unreachable reject with tcp reset }
//	chain redirects { type filter hook output priority filter;     oifname "coracle0" icmpv6 type nd-redirect drop }
//
// A pod adds elements and never rules, so that its cost does not grow with the number of pods. hairpin holds a
// pod's address twice: a pod that reaches itself by its host port would drop a packet from its own address.
type firewall struct {
	rules    *ruleset
	bridge   string
	families []*family
}

// forward is one host port of a pod, as the node's namespace sees it. Both addresses are of one version.
type forward struct {
	protocol byte           // IPPROTO_*
	host     netip.AddrPort // of the node; the unspecified address stands for all that it has
	to       netip.AddrPort // the pod's
}

// tables names the objects of one family's table, for one transaction.
type tables struct {
	*family
	table       *nftables.Table
	hostPorts   *nftables.Set
	hostPortsAt *nftables.Set
	hairpin     *nftables.Set
}

func newTables(f *family) tables {
	table := &nftables.Table{Family: f.tableFamily(), Name: firewallTable}
	target := nftables.MustConcatSetType(f.addr, nftables.TypeInetService)
	return tables{
		family: f,
		table:  table,
		hostPorts: &nftables.Set{Table: table, Name: "hostports", IsMap: true, Concatenation: true,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService), DataType: target},
		hostPortsAt: &nftables.Set{Table: table, Name: "hostports_at", IsMap: true, Concatenation: true,
			KeyType: nftables.MustConcatSetType(f.addr, nftables.TypeInetProto, nftables.TypeInetService), DataType: target},
		hairpin: &nftables.Set{Table: table, Name: "hairpin", Concatenation: true,
			KeyType: nftables.MustConcatSetType(f.addr, f.addr)},
	}
}

func (t tables) sets() []*nftables.Set { return []*nftables.Set{t.hostPorts, t.hostPortsAt, t.hairpin} }

// transaction sends what fill adds for each of the families, all or nothing.
func (f *firewall) transaction(fill func(*nftables.Conn, tables) error) error {
	return f.rules.transaction(func(conn *nftables.Conn) error {
		for _, version := range f.families {
			if err := fill(conn, newTables(version)); err != nil {
				return err
			}
		}
		return nil
	})
}

// replace makes the tables hold exactly this.
func (f *firewall) replace(prefixes []netip.Prefix, forwards []forward) error {
	err := f.transaction(func(c *nftables.Conn, t tables) error {
		c.AddTable(t.table) // so that there is one to delete
		c.DelTable(t.table)
		c.AddTable(t.table)
		for _, set := range t.sets() {
			if err := c.AddSet(set, nil); err != nil {
				return err
			}
		}
		f.addChains(c, t, prefixes)
		return addForwards(c, t, forwards)
	})
	if err != nil {
		return fmt.Errorf("write nftables table %s: %w", firewallTable, err)
	}
	return nil
}

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

// elements are those of each set of t.sets(), by index.
type elements [3][]nftables.SetElement

// elementsOf turns the forwards of the table's family into those of its sets.
func (t tables) elementsOf(forwards []forward) elements {
	var out elements
	seen := map[netip.Addr]bool{}
	for _, f := range forwards {
		if familyOf(f.to.Addr()) != t.family {
			continue
		}
		to := f.to.Addr().AsSlice()
		value := concat(to, binaryutil.BigEndian.PutUint16(f.to.Port()))
		port := concat([]byte{f.protocol}, binaryutil.BigEndian.PutUint16(f.host.Port()))
		if f.host.Addr().IsUnspecified() {
			out[0] = append(out[0], nftables.SetElement{Key: port, Val: value})
		} else {
			out[1] = append(out[1], nftables.SetElement{Key: concat(f.host.Addr().AsSlice(), port), Val: value})
		}
		if !seen[f.to.Addr()] {
			seen[f.to.Addr()] = true
			out[2] = append(out[2], nftables.SetElement{Key: concat(to, to)})
		}
	}
	return out
}

// concat is a concatenation as nf_tables has it: each part fills whole words of 4 bytes.
func concat(parts ...[]byte) []byte {
	var out []byte
	for _, part := range parts {
		out = append(out, part...)
		for len(out)%4 != 0 {
			out = append(out, 0)
		}
	}
	return out
}

// addForwards sends few elements a message: a netlink attribute ends at 64 KiB.
func addForwards(c *nftables.Conn, t tables, forwards []forward) error {
	const batch = 256
	for len(forwards) > 0 {
		some := forwards[:min(batch, len(forwards))]
		forwards = forwards[len(some):]
		if err := t.each(some, c.SetAddElements); err != nil {
			return err
		}
	}
	return nil
}

// each hands the elements to change to do, a set at a time.
func (t tables) each(forwards []forward, do func(*nftables.Set, []nftables.SetElement) error) error {
	elements := t.elementsOf(forwards)
	for i, set := range t.sets() {
		if len(elements[i]) == 0 {
			continue
		}
		if err := do(set, elements[i]); err != nil {
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
	err := f.transaction(func(c *nftables.Conn, t tables) error { return t.each(forwards, c.SetDeleteElements) })
	if errors.Is(err, unix.ENOENT) { // some are gone, and none was removed: one by one
		err = f.removeEach(forwards)
	}
	if err != nil {
		return fmt.Errorf("remove host ports from nftables table %s: %w", firewallTable, err)
	}
	return nil
}

func (f *firewall) removeEach(forwards []forward) error {
	var errs []error
	for _, version := range f.families {
		one := &firewall{rules: f.rules, bridge: f.bridge, families: []*family{version}}
		for i, some := range newTables(version).elementsOf(forwards) {
			for _, e := range some {
				err := one.transaction(func(c *nftables.Conn, t tables) error {
					return c.SetDeleteElements(t.sets()[i], []nftables.SetElement{e})
				})
				if !errors.Is(err, unix.ENOENT) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}
