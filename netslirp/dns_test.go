package netslirp

import (
	"os"
	"path/filepath"
	"testing"
)

func TestResolvConf(t *testing.T) {
	host := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(host, []byte("# systemd-resolved\nnameserver 127.0.0.53\ndomain old.example\nsearch corp.example vpn.example ; both\noptions edns0\noptions trust-ad\n"), 0o600))
	n := &Network{cfg: Config{DNS: "10.0.2.3", HostResolvConf: host}}
	for _, c := range []struct {
		name                       string
		servers, searches, options []string
		want                       string
	}{
		{"as the host", nil, nil, nil, "nameserver 10.0.2.3\nsearch corp.example vpn.example\noptions edns0 trust-ad\n"},
		{"own search", nil, []string{"pod.example"}, nil, "nameserver 10.0.2.3\nsearch pod.example\noptions edns0 trust-ad\n"},
		{"a cluster's", []string{"10.96.0.10"}, []string{"default.svc.cluster.local", "svc.cluster.local"}, []string{"ndots:5"},
			"nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n"},
		{"only servers", []string{"10.96.0.10"}, nil, nil, "nameserver 10.96.0.10\n"},
		{"loopback", []string{"127.0.0.53", "::1", "192.0.2.1", "192.0.2.1", "127.0.0.1"}, nil, nil, "nameserver 10.0.2.3\nnameserver 192.0.2.1\n"},
		{"IPv6", []string{"fd00::3", "fe80::1%eth0"}, nil, nil, "nameserver fd00::3\nnameserver fe80::1%eth0\n"},
	} {
		got, err := n.ResolvConf(c.servers, c.searches, c.options)
		if err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
	}
	for _, bad := range [][3][]string{
		{{"dns.example"}, nil, nil}, {{"192.0.2.1\nnameserver 6.6.6.6"}, nil, nil},
		{{"192.0.2.1"}, {"a b"}, nil}, {{"192.0.2.1"}, {"a\nnameserver 6.6.6.6"}, nil}, {{"192.0.2.1"}, nil, []string{""}},
	} {
		_, err := n.ResolvConf(bad[0], bad[1], bad[2])
		wantIs(t, err, ErrInvalid, "DNS")
	}
}

func TestResolvConfWithoutTheHostsFileOrADNSAddress(t *testing.T) {
	n := &Network{cfg: Config{DNS: "10.0.2.3", HostResolvConf: filepath.Join(t.TempDir(), "none")}}
	if got, err := n.ResolvConf(nil, nil, nil); err != nil || got != "nameserver 10.0.2.3\n" {
		t.Errorf("got %q, %v", got, err)
	}
	host := filepath.Join(t.TempDir(), "resolv.conf")
	must(t, os.WriteFile(host, []byte("nameserver 127.0.0.53\nnameserver 192.0.2.1\n"), 0o600))
	n = &Network{cfg: Config{HostResolvConf: host}}
	if got, err := n.ResolvConf(nil, nil, nil); err != nil || got != "nameserver 192.0.2.1\n" {
		t.Errorf("got %q, %v", got, err)
	}
	_, err := n.ResolvConf([]string{"127.0.0.1"}, nil, nil)
	wantIs(t, err, ErrInvalid, "none can be reached")
}
