package netslirp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestHardwareAddrsDiffer(t *testing.T) {
	if got := hardwareAddr(netip.MustParseAddr("10.88.0.2")).String(); got != "0a:58:0a:58:00:02" {
		t.Errorf("of IPv4: %s", got)
	}
	seen := map[string]netip.Addr{}
	for ip := netip.MustParseAddr("fd00::"); ip != netip.MustParseAddr("fd00::1:0"); ip = ip.Next() {
		mac := hardwareAddr(ip).String()
		if other, ok := seen[mac]; ok || len(mac) != 17 {
			t.Fatalf("%s and %s have %s", ip, other, mac)
		}
		seen[mac] = ip
	}
}

// Nothing outside the node can be reached by IPv6: a program that tries is told at once, and takes the next address.
func TestIPv6OutOfTheNodeFailsAtOnce(t *testing.T) {
	l := newLab(t)
	n := l.open()
	p := l.attach(n, "a")
	_, err := ask(p.ns, "tcp", "[2001:db8::1]:80")
	wantIs(t, err, unix.ENETUNREACH, "2001:db8::1")
	_, err = ask(p.ns, "tcp", "[fdff::1]:80") // another organization's, by its form
	wantIs(t, err, unix.ECONNREFUSED, "fdff::1")
	_, err = ask(p.ns, "tcp", join(sixOf("9"), 80)) // of the pods' network, and nobody's
	if err == nil {
		t.Error("an address that no pod has answered")
	}
}

// An IPv6 address comes to a pod whose other address, and with it the MAC, is not that of the pod before.
func TestIPv6AddressComesBackWithAnotherMAC(t *testing.T) {
	l := newLab(t)
	l.cfg.PodCIDR = "10.99.0.0/24,fd00:1::/126" // two addresses and the gateway
	n := l.open()
	client, old := l.attach(n, "client"), l.attach(n, "old")
	serveTCP(t, old.ns, ":80", "old")
	wantAnswer(t, l.node, "tcp", join(old.ip6, 80), "old fd00:1::1")
	wantAnswer(t, client.ns, "tcp", join(old.ip6, 80), "old "+client.ip6)
	must(t, n.Detach(context.Background(), old.id, old.ns))
	fresh := l.attach(n, "fresh")
	if fresh.ip6 != old.ip6 || fresh.ip == old.ip {
		t.Fatalf("addresses %s %s, were %s %s", fresh.ip, fresh.ip6, old.ip, old.ip6)
	}
	serveTCP(t, fresh.ns, ":80", "fresh")
	wantAnswer(t, l.node, "tcp", join(fresh.ip6, 80), "fresh fd00:1::1")
	wantAnswer(t, client.ns, "tcp", join(fresh.ip6, 80), "fresh "+client.ip6)
}

// A pod whose sysctls disable IPv6 has what is left.
func TestPodThatDisablesIPv6(t *testing.T) {
	l := newLab(t)
	n := l.open()
	without := func() string {
		ns := newNetNS(t)
		within(t, ns, func() error { return writeSysctl("ipv6/conf/all/disable_ipv6", "1") })
		return ns
	}
	ns := without()
	ctx := context.Background()
	port := PortMapping{HostPort: 20080, ContainerPort: 80}
	got, err := n.Attach(ctx, AttachRequest{PodID: "a", NetNS: ns, Ports: []PortMapping{port}})
	if err != nil || got.IP != "10.88.0.2" || len(got.AdditionalIPs) > 0 {
		t.Fatalf("got %+v, %v", got, err)
	}
	serveTCP(t, ns, ":80", "a")
	wantAnswer(t, l.node, "tcp", "127.0.0.1:20080", "a 10.88.0.1")
	if got := n.ledger.addresses("a"); len(got) != 1 {
		t.Errorf("the pod holds %v", got)
	}
	must(t, n.Detach(ctx, "a", ns))
	must(t, n.SetPodCIDR("fd00:1::/64"))
	_, err = n.Attach(ctx, AttachRequest{PodID: "b", NetNS: without()})
	wantIs(t, err, ErrInvalid, "a sysctl of the pod disables IPv6")
	l.checkEmpty(n)
}

func TestNodeWithoutIPv6(t *testing.T) {
	l := newLab(t)
	within(t, l.node, func() error { return writeSysctl("ipv6/conf/all/disable_ipv6", "1") })
	n := l.open()
	a, b := l.attach(n, "a", PortMapping{HostPort: 20080, ContainerPort: 80}), l.attach(n, "b")
	if a.ip != "10.88.0.2" || a.ip6 != "" {
		t.Errorf("addresses %s and %q", a.ip, a.ip6)
	}
	serveTCP(t, a.ns, ":80", "a")
	wantAnswer(t, b.ns, "tcp", join(uplinkIP, 20080), "a "+b.ip)
	info := n.Info()
	if info["podCIDR"] != "10.88.0.0/16" || !strings.Contains(info["ipv6"], "IPv6 is disabled") {
		t.Errorf("info: %v", info)
	}
	wantIs(t, n.SetPodCIDR("10.1.0.0/24,fd00:1::/64"), ErrUnsupported, "IPv6 is disabled")
	must(t, n.SetPodCIDR("10.1.0.0/24"))
	must(t, n.Close())
	cfg := l.cfg
	cfg.PodCIDR = "fd00:1::/64"
	_, err := Open(cfg)
	wantIs(t, err, ErrUnsupported, "IPv6 is disabled")
}

func TestSmallMTUHasNoIPv6(t *testing.T) {
	l := newLab(t)
	l.cfg.MTU = 1000
	n := l.open()
	if a := l.attach(n, "a"); a.ip6 != "" || !strings.Contains(n.Info()["ipv6"], "an MTU of 1280, and network.mtu is 1000") {
		t.Errorf("address %s, info %v", a.ip6, n.Info())
	}
}

// A daemon takes over from one that knew IPv4 alone: its records, its pod CIDR, its nftables table.
func TestRecordsOfAnEarlierVersion(t *testing.T) {
	l := newLab(t)
	l.cfg.PodCIDR = formerPodCIDR
	n := l.open()
	must(t, n.SetPodCIDR("10.200.0.0/24"))
	old := l.attach(n, "old", PortMapping{HostPort: 20080, ContainerPort: 80})
	link := n.pods["old"].Link
	must(t, n.Close())
	must(t, os.WriteFile(l.recordFile("old"), []byte(`{"version":1,"podID":"old","link":"`+link+`","prefix":"10.200.0.0/24",`+
		`"addresses":["10.200.0.2"],"ports":[{"protocol":"tcp","hostPort":20080,"containerPort":80}]}`), 0o600))

	l.cfg.PodCIDR = ""
	n = l.open()
	must(t, n.Reconcile(context.Background(), map[string]bool{"old": true}))
	serveTCP(t, old.ns, ":80", "old")
	fresh := l.attach(n, "fresh")
	if fresh.ip != "10.200.0.3" { // what the kubelet set outlasts a change of the default
		t.Errorf("address %s", fresh.ip)
	}
	wantAnswer(t, fresh.ns, "tcp", join(uplinkIP, 20080), "old "+fresh.ip)
	wantAnswer(t, "", "tcp", "127.0.0.1:20080", "old 10.200.0.1")
	for _, p := range []pod{old, fresh} {
		must(t, n.Detach(context.Background(), p.id, p.ns))
	}
	l.checkEmpty(n)
}

func (l *lab) recordFile(podID string) string { return filepath.Join(l.cfg.Dir, "pods", podID+".json") }

// A record that cannot be read costs its pod nothing that can be seen elsewhere.
func TestUnreadableRecordIsSetAside(t *testing.T) {
	for name, content := range map[string]string{
		"not JSON": "{", "of a later version": `{"version":99,"podID":"a"}`, "no addresses": `{"version":2,"podID":"a","link":"pod0"}`,
		"another pod's": `{"version":2,"podID":"b","link":"pod0","addresses":["10.88.0.2/16"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			n := l.open()
			a := l.attach(n, "a", PortMapping{HostPort: 20080, ContainerPort: 80}, PortMapping{HostPort: 20081, ContainerPort: 80, HostIP: "::1"})
			client := l.attach(n, "client")
			gone := l.attach(n, "gone")
			serveTCP(t, a.ns, ":80", "a")
			must(t, n.Close())
			for _, id := range []string{"a", "gone"} {
				must(t, os.WriteFile(l.recordFile(id), []byte(content), 0o600))
			}
			must(t, os.WriteFile(l.cfg.cidrFile(), []byte("{"), 0o600))

			var logged bytes.Buffer
			l.cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
			n = l.open()
			must(t, n.Reconcile(context.Background(), map[string]bool{"a": true, "client": true}))
			for _, path := range []string{l.recordFile("a"), l.recordFile("gone"), l.cfg.cidrFile()} {
				if _, err := os.Stat(path + ".unreadable"); err != nil || !strings.Contains(logged.String(), path+".unreadable") {
					t.Errorf("%s: %v, log:\n%s", path, err, logged.String())
				}
			}
			wantAnswer(t, client.ns, "tcp", join(a.ip6, 80), "a "+client.ip6)
			wantAnswer(t, client.ns, "tcp", join(uplinkIP, 20080), "a "+client.ip)
			wantAnswer(t, "", "tcp", "[::1]:20081", "a "+sixOf("1"))
			if fresh := l.attach(n, "fresh"); fresh.ip == a.ip {
				t.Errorf("%s was given twice", fresh.ip)
			}
			must(t, n.Close())
			n = l.open() // what was made again is on disk
			must(t, n.Reconcile(context.Background(), map[string]bool{"a": true, "client": true}))
			wantAnswer(t, client.ns, "tcp", join(uplinkIP, 20080), "a "+client.ip)
			wantSilence(t, client.ns, "tcp", join(gone.ip, 80))
			for _, id := range []string{"a", "client"} {
				must(t, n.Detach(context.Background(), id, ""))
				_ = os.Remove(l.recordFile(id) + ".unreadable")
			}
			must(t, os.Remove(l.recordFile("gone")+".unreadable"))
			l.checkEmpty(n)
		})
	}
}

func TestConsistentRepeatsAnInterruptedDump(t *testing.T) {
	times := 0
	got, err := consistent(func() ([]int, error) {
		if times++; times < 3 {
			return []int{1}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(got) != 2 || times != 3 {
		t.Errorf("%v, %v after %d times", got, err, times)
	}
	broken := errors.New("broken")
	if _, err := consistent(func() ([]int, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := consistent(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Error(err)
	}
}
