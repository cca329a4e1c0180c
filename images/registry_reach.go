package images

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"
)

// nearness orders addresses by how much of this machine's surroundings they are: what a registry may lead to, by a
// redirect or as its token server, is no nearer than itself.
type nearness int

const (
	farAway   nearness = iota // the world
	inNetwork                 // private networks
	onLink                    // link-local, where clouds keep their metadata servers
	onMachine                 // loopback
)

var sharedAddresses = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598: carriers' and VPNs' own

func nearnessOf(ip netip.Addr) nearness {
	ip = ip.Unmap()
	switch {
	case ip.IsLoopback(), ip.IsUnspecified():
		return onMachine
	case ip.IsLinkLocalUnicast(), ip.IsMulticast():
		return onLink
	case ip.IsPrivate(), sharedAddresses.Contains(ip):
		return inNetwork
	}
	return farAway
}

// reach dials for one registry. It looks at addresses after names are resolved, so that a name does not lead where its
// number would be refused.
type reach struct {
	timeout time.Duration
	own     map[string]bool        // the registry itself, by host:port
	named   func(host string) bool // hosts that the configuration has a section for may be anywhere

	mu      sync.Mutex
	known   bool
	at      nearness        // of the registry, the farthest that it was reached at
	proxies map[string]bool // by host:port: whoever is behind them is resolved by them
}

func newReach(host string, timeout time.Duration, named func(string) bool) *reach {
	return &reach{timeout: timeout, own: ownAddresses(host), named: named, proxies: map[string]bool{}}
}

// ownAddresses are what a registry host stands for, by host:port.
func ownAddresses(host string) map[string]bool {
	if host == dockerHub {
		host = dockerHubHost
	}
	if _, _, err := net.SplitHostPort(host); err == nil {
		return map[string]bool{host: true}
	}
	host = strings.Trim(host, "[]")
	return map[string]bool{net.JoinHostPort(host, "443"): true, net.JoinHostPort(host, "80"): true}
}

// proxy is http.ProxyFromEnvironment, and keeps what it says.
func (r *reach) proxy(req *http.Request) (*url.URL, error) {
	p, err := http.ProxyFromEnvironment(req)
	if p != nil {
		r.mu.Lock()
		r.proxies[address(p)] = true
		r.mu.Unlock()
	}
	return p, err
}

func (r *reach) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: r.timeout, KeepAlive: r.timeout, Control: func(_, resolved string, _ syscall.RawConn) error {
		return r.check(addr, resolved)
	}}
	conn, err := d.DialContext(ctx, network, addr)
	if err == nil && r.own[addr] {
		r.reached(conn.RemoteAddr())
	}
	return conn, err
}

func (r *reach) reached(at net.Addr) {
	ap, err := netip.ParseAddrPort(at.String())
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if near := nearnessOf(ap.Addr()); !r.known || near < r.at {
		r.known, r.at = true, near
	}
}

// check is called before each connection with the name that was asked for and the address that it turned out to be.
func (r *reach) check(addr, resolved string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	ap, err := netip.ParseAddrPort(resolved)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if isLoopback(host) && !ap.Addr().Unmap().IsLoopback() && !r.proxies[addr] {
		return fmt.Errorf("%w: %s is %s here, which is not this machine", errMisled, host, ap.Addr().Unmap())
	}
	if r.own[addr] || r.proxies[addr] || nearnessOf(ap.Addr()) <= r.at || r.named(addr) || r.named(host) {
		return nil
	}
	return fmt.Errorf("%w: the registry leads to %s, which is %s, an address of this machine's own surroundings; "+
		"give that host a section in registries if it is to be trusted", errMisled, addr, ap.Addr().Unmap())
}
