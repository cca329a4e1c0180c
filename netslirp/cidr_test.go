package netslirp

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestParsePodCIDR(t *testing.T) {
	for _, good := range []string{"10.1.0.0/16", "fd00:1::/64", "10.1.0.0/16,fd00:1::/64", "fd00:1::/64,10.1.0.0/16"} {
		got, err := parsePodCIDR(good)
		if err != nil || formatPodCIDR(got) != good {
			t.Errorf("%s: %v, %v", good, got, err)
		}
	}
	if got, err := parsePodCIDR(" 10.1.0.0/16, fd00:1::/64 "); err != nil || formatPodCIDR(got) != "10.1.0.0/16,fd00:1::/64" {
		t.Errorf("with spaces: %v, %v", got, err)
	}
	for bad, want := range map[string]string{
		"": `pod CIDR ""`, "pods": `pod CIDR "pods"`, "10.1.0.0/16,": `pod CIDR ""`, "10.1.2.3/16": "its network is 10.1.0.0/16",
		"fd00::1/64": "its network is fd00::/64", "10.1.0.0/16,10.2.0.0/16": "two networks of one version",
		"fd00:1::/64,fd00:2::/64": "two networks of one version", "10.1.0.0/16,fd00::/64,fd01::/64": "two networks of one version",
		"::ffff:10.1.0.0/112": "IPv4 in the form of IPv6", "224.0.0.0/16": "no pod can have", "239.1.0.0/16": "no pod can have", "127.0.0.0/16": "no pod can have",
		"0.0.0.0/8": "no pod can have", "ff02::/64": "no pod can have", "::/64": "no pod can have", "fe80::/64": "no pod can have",
	} {
		_, err := parsePodCIDR(bad)
		wantIs(t, err, ErrInvalid, want)
	}
}

func TestSetPodCIDR(t *testing.T) {
	l := newLab(t)
	n := l.open()
	old := l.attach(n, "old")
	must(t, n.SetPodCIDR(""))
	must(t, n.SetPodCIDR("10.88.0.0/16"))
	wantIs(t, n.SetPodCIDR("10.0.0.0/8"), ErrInvalid, "overlaps 10.0.2.0/24, which the node has")
	wantIs(t, n.SetPodCIDR("10.1.2.3/24"), ErrInvalid, "its network is 10.1.2.0/24")
	wantIs(t, n.SetPodCIDR("10.1.2.0/31"), ErrInvalid, "too small")
	wantIs(t, n.SetPodCIDR("pods"), ErrInvalid, "pods")
	must(t, n.SetPodCIDR("10.200.1.0/24"))
	must(t, n.Close())
	n = l.open() // the kubelet's choice lasts
	fresh := l.attach(n, "fresh")
	if fresh.ip != "10.200.1.2" || n.Info()["podCIDR"] != "10.200.1.0/24" {
		t.Errorf("got %s of %s", fresh.ip, n.Info()["podCIDR"])
	}
	serveTCP(t, l.world, ":80", "world")
	serveTCP(t, old.ns, ":80", "old")
	wantAnswer(t, old.ns, "tcp", join(worldIP, 80), "world "+uplinkIP)
	wantAnswer(t, fresh.ns, "tcp", join(worldIP, 80), "world "+uplinkIP)
	wantAnswer(t, fresh.ns, "tcp", join(old.ip, 80), "old "+fresh.ip)
	must(t, n.Detach(context.Background(), "old", old.ns))
	must(t, n.Detach(context.Background(), "fresh", fresh.ns))
	l.checkEmpty(n)
}

// A pod CIDR that is refused, or whose way into force is cut off at any step, leaves no trace.
func TestSetPodCIDRAllOrNone(t *testing.T) {
	const next = "fd99::/64,10.99.0.0/24"
	for what, c := range map[string]struct {
		cidr    string
		prepare func(l *lab, n *Network) (mend func())
		want    string
	}{
		"the second network overlaps":   {"fd99::/64,10.0.2.0/24", nil, "overlaps 10.0.2.0/24"},
		"the second is too small":       {"fd99::/64,10.99.0.0/31", nil, "too small"},
		"the second address is refused": {"10.99.0.0/24,ff02::/64", nil, "give coracle0 the address ff02::1/64"},
		"the firewall": {next, func(l *lab, n *Network) func() {
			must(l.t, n.firewall.transaction(func(c *nftables.Conn, t tables) error {
				if t.family == ipv6 {
					c.DelTable(t.table)
				}
				return nil
			}))
			return func() { must(l.t, n.firewall.replace(n.pools.prefixes(), nil)) }
		}, "write masquerade"},
		"the disk": {next, func(l *lab, _ *Network) func() {
			temp := l.cfg.cidrFile() + tempSuffix
			must(l.t, os.Mkdir(temp, 0o700))
			return func() { must(l.t, os.Remove(temp)) }
		}, "write network state"},
	} {
		t.Run(what, func(t *testing.T) {
			l := newLab(t)
			n := l.open()
			before, mend := l.layout(), func() {}
			if c.prepare != nil {
				mend = c.prepare(l, n)
			}
			set := n.SetPodCIDR
			if strings.Contains(c.cidr, "ff02::") { // which would not come as far
				set = n.setUnchecked
			}
			if err := set(c.cidr); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
			mend()
			if after := l.layout(); after != before {
				t.Errorf("the node was\n%s\nand is\n%s", before, after)
			}
			if got := n.Info()["podCIDR"]; got != DefaultPodCIDR {
				t.Errorf("pod CIDR %s", got)
			}
			must(t, n.SetPodCIDR(next)) // nothing is in the way of one that is right
			if after := l.layout(); after == before {
				t.Error("the layout does not tell one pod CIDR from another")
			}
		})
	}
}

// setUnchecked lays out networks that nobody has looked at.
func (n *Network) setUnchecked(cidrs string) error {
	var prefixes []netip.Prefix
	for cidr := range strings.SplitSeq(cidrs, ",") {
		prefixes = append(prefixes, netip.MustParsePrefix(cidr))
	}
	current, err := newPools(prefixes, n.ledger)
	if err != nil {
		return err
	}
	return n.layPools(n.pools, pools{current: current})
}

// An address that the bridge had before, of an older pod CIDR, is not taken back with the new ones.
func TestSetPodCIDRKeepsFormerGateways(t *testing.T) {
	l := newLab(t)
	n := l.open()
	must(t, n.SetPodCIDR("10.99.0.0/24,fd99::/64"))
	before := l.layout()
	temp := l.cfg.cidrFile() + tempSuffix
	must(t, os.Mkdir(temp, 0o700))
	wantIs(t, n.SetPodCIDR("fd98::/64,10.88.0.0/16"), unix.EISDIR, "write network state")
	if after := l.layout(); after != before {
		t.Errorf("the node was\n%s\nand is\n%s", before, after)
	}
}

// layout is what a pod CIDR changes on a node: addresses, routes and rules.
func (l *lab) layout() string {
	l.t.Helper()
	var out strings.Builder
	must(l.t, l.inNode(func() error {
		for _, f := range []*family{ipv4, ipv6} {
			link, err := netlink.LinkByName(DefaultBridge)
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(link, f.number)
			if err != nil {
				return err
			}
			routes, err := netlink.RouteList(link, f.number)
			if err != nil {
				return err
			}
			var lines []string
			for _, a := range addrs {
				lines = append(lines, a.IPNet.String())
			}
			for _, r := range routes {
				lines = append(lines, fmt.Sprint("route ", r.Dst))
			}
			slices.Sort(lines)
			rules, err := (&nftables.Conn{}).GetRules(newTables(f).table, &nftables.Chain{Name: postrouting})
			if err != nil {
				return err
			}
			for _, r := range rules {
				raw, err := json.Marshal(r.Exprs)
				if err != nil {
					return err
				}
				lines = append(lines, string(raw))
			}
			fmt.Fprintln(&out, strings.Join(lines, "\n"))
		}
		return nil
	}))
	return out.String()
}

// The order of the networks is that of a pod's addresses, and one of them alone is enough.
func TestPodCIDROrderAndSingleIPv6(t *testing.T) {
	l := newLab(t)
	l.cfg.PodCIDR = "fd00:1::/64,10.1.0.0/24"
	n := l.open()
	both := l.attach(n, "both", PortMapping{HostPort: 20080, ContainerPort: 80})
	if both.ip != "fd00:1::2" || both.ip6 != "10.1.0.2" {
		t.Errorf("addresses %s and %s", both.ip, both.ip6)
	}
	must(t, n.SetPodCIDR("fd00:2::/64"))
	six := l.attach(n, "six", PortMapping{HostPort: 20081, ContainerPort: 80})
	if six.ip != "fd00:2::2" || six.ip6 != "" {
		t.Errorf("addresses %s and %q", six.ip, six.ip6)
	}
	serveTCP(t, both.ns, ":80", "both")
	serveTCP(t, six.ns, ":80", "six")
	wantAnswer(t, both.ns, "tcp", join(six.ip, 80), "six "+both.ip)
	wantAnswer(t, six.ns, "tcp", join(both.ip, 80), "both "+six.ip)
	wantAnswer(t, six.ns, "tcp", join("fd00:1::1", 20080), "both "+six.ip)
	wantAnswer(t, "", "tcp", "127.0.0.1:20080", "both 10.1.0.1")
	// A host port of a pod without IPv4 is one of the host's all the same: the port driver makes a connection of its own.
	wantAnswer(t, "", "tcp", "127.0.0.1:20081", "six fd00:2::1")
	wantAnswer(t, "", "tcp", "[::1]:20081", "six fd00:2::1")
	must(t, n.Ready())
	for _, p := range []pod{both, six} {
		must(t, n.Detach(context.Background(), p.id, p.ns))
	}
	l.checkEmpty(n)
}

// The tests' own namespace is the host: with a network as podman's it has one that pods do not reach.
func TestHiddenFromPods(t *testing.T) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "podman0"
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	t.Cleanup(func() {
		link, err := netlink.LinkByName("podman0")
		must(t, err)
		must(t, netlink.LinkDel(link))
	})
	must(t, address("podman0", "10.88.0.1/16"))
	must(t, address("podman0", "fd00:88::1/64"))
	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("10.88.0.9")})) // a default route hides nothing
	for cidr, want := range map[string]string{
		DefaultPodCIDR: "[10.88.0.0/16 (podman0)]", "10.88.7.0/24": "[10.88.0.0/16 (podman0)]", "10.89.0.0/16": "[]",
		"10.89.0.0/16,fd00:88::/56": "[fd00:88::/64 (podman0)]",
	} {
		if got, err := HiddenFromPods(cidr); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s hides %v, %v; want %s", cidr, got, err, want)
		}
	}
	_, err := HiddenFromPods("pods")
	wantIs(t, err, ErrInvalid, "pods")
	var logged bytes.Buffer
	l := newLab(t)
	l.cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
	n := l.open()
	if !strings.Contains(logged.String(), "10.88.0.0/16 (podman0)") {
		t.Errorf("log: %s", logged.String())
	}
	logged.Reset()
	must(t, n.SetPodCIDR("10.89.0.0/16"))
	if logged.Len() > 0 {
		t.Errorf("log: %s", logged.String())
	}
}
