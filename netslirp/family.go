package netslirp

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// family is where the two versions of IP differ for the kernel.
type family struct {
	name     string // as nft(8) names the tables
	number   int    // AF_INET or AF_INET6; NFPROTO_IPV4 and NFPROTO_IPV6 are the same numbers
	addr     nftables.SetDatatype
	size     uint32 // of an address, in bytes
	saddr    uint32 // offset of the source address in the header (RFC 791, RFC 8200); the destination follows it
	loopback netip.Prefix
	all      netip.Prefix
}

var (
	ipv4 = &family{name: "ip", number: unix.AF_INET, addr: nftables.TypeIPAddr, size: 4, saddr: 12,
		loopback: netip.MustParsePrefix("127.0.0.0/8"), all: netip.MustParsePrefix("0.0.0.0/0")}
	ipv6 = &family{name: "ip6", number: unix.AF_INET6, addr: nftables.TypeIP6Addr, size: 16, saddr: 8,
		loopback: netip.MustParsePrefix("::1/128"), all: netip.MustParsePrefix("::/0")}
)

func familyOf(a netip.Addr) *family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

func (f *family) daddr() uint32 { return f.saddr + f.size }

func (f *family) tableFamily() nftables.TableFamily { return nftables.TableFamily(f.number) }

// ipNet keeps the host bits: it serves for interface addresses as well as for networks.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
