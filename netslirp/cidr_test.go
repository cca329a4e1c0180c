package netslirp

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
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
		"::ffff:10.1.0.0/112": "IPv4 in the form of IPv6",
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
