package netslirp

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port/portutil"
)

// What a kubelet says of a pod's network, as it comes. To run one: make fuzz RUN=FuzzPodCIDR.

func FuzzPodCIDR(f *testing.F) {
	for _, seed := range []string{DefaultPodCIDR, "10.1.0.0/16", " 10.1.0.0/16, fd00:1::/64 ", "fd00::1/64", "10.1.0.0/31", "::ffff:10.1.0.0/112",
		"0.0.0.0/0,::/0", "255.255.255.252/30", "fe80::%eth0/64", "10.1.0.0/16,", "pods", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, cidrs string) {
		prefixes, err := parsePodCIDR(cidrs)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || len(prefixes) > 0 {
				t.Errorf("%q: %v, %v", cidrs, prefixes, err)
			}
			return
		}
		if len(prefixes) == 0 || len(prefixes) > 2 || len(prefixes) == 2 && familyOf(prefixes[0].Addr()) == familyOf(prefixes[1].Addr()) {
			t.Errorf("%q: %v", cidrs, prefixes)
		}
		if again, err := parsePodCIDR(formatPodCIDR(prefixes)); err != nil || !slices.Equal(again, prefixes) {
			t.Errorf("%q: %v, after a restart %v, %v", cidrs, prefixes, again, err)
		}
		pools, err := newPools(prefixes, nil)
		if check := CheckPodCIDR(cidrs); (check == nil) != (err == nil) {
			t.Errorf("%q: checked %v, used %v", cidrs, check, err)
		}
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", cidrs, err)
		}
		for _, p := range pools {
			if !p.prefix.Contains(p.gateway) || p.gateway == p.prefix.Addr() {
				t.Errorf("%q: gateway %s of %s", cidrs, p.gateway, p.prefix)
			}
		}
	})
}

// Two mappings, as each is held against those before it.
func FuzzPortMappings(f *testing.F) {
	f.Add("TCP", 8080, 80, "127.0.0.1", "udp", 8080, 80, "::1")
	f.Add("", 8080, 80, "", "tcp", 8080, 81, "0.0.0.0")
	f.Add("sctp", 1, 1, "", "icmp", 2, 2, "")
	f.Add("udp", 65535, 1, "::ffff:1.2.3.4", "udp", 65535, 65535, "1.2.3.4")
	f.Add("tcp", 80, 80, "fe80::1%eth0", "tcp", 80, 80, "fe80::1%eth1")
	f.Add("tcp", 0, 80, "nowhere", "tcp", -1, 65536, "::")
	pods := []*record{
		{Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.0.2/16"), netip.MustParsePrefix("fd00::2/64")}},
		{Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.0.2/16")}},
		{Addresses: []netip.Prefix{netip.MustParsePrefix("fd00::2/64")}},
	}
	f.Fuzz(func(t *testing.T, proto1 string, host1, to1 int, ip1, proto2 string, host2, to2 int, ip2 string) {
		asked := []PortMapping{{Protocol: proto1, HostPort: host1, ContainerPort: to1, HostIP: ip1},
			{Protocol: proto2, HostPort: host2, ContainerPort: to2, HostIP: ip2}}
		got, err := normalize(asked)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrPortInUse) || len(got) > 0 {
				t.Errorf("%+v: %v, %v", asked, got, err)
			}
			return
		}
		if again, err := normalize(got); err != nil || !slices.Equal(again, got) {
			t.Errorf("%+v: %v, and of that %v, %v", asked, got, again, err)
		}
		if len(got) == 2 && (got[0].overlaps(got[1]) || got[1].overlaps(got[0])) {
			t.Errorf("%+v overlap", got)
		}
		for _, r := range pods {
			checkPublished(t, got, r)
		}
	})
}

// checkPublished holds what the mappings become against those who take it: the port driver, and a map of nftables, which
// has a key once.
func checkPublished(t *testing.T, mappings []PortMapping, of *record) {
	t.Helper()
	for _, m := range mappings {
		target := m.target(of)
		if !of.has(target) {
			t.Errorf("%v leads to %s", m, target)
		}
		if err := portutil.ValidatePortSpec(m.spec(target), nil); err != nil {
			t.Errorf("%v: the port driver takes no %+v: %v", m, m.spec(target), err)
		}
	}
	r := *of
	r.Ports = mappings
	all := forwards(&r)
	for _, version := range []*family{ipv4, ipv6} {
		elements := newTables(version).elementsOf(all)
		for i, set := range newTables(version).sets() {
			keys := map[string]bool{}
			for _, e := range elements[i] {
				if keys[string(e.Key)] || len(e.Key) != int(set.KeyType.Bytes) || len(e.Val) != int(set.DataType.Bytes) {
					t.Errorf("%v: %s takes no %x: %x", mappings, set.Name, e.Key, e.Val)
				}
				keys[string(e.Key)] = true
			}
		}
	}
}
