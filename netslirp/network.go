package netslirp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Config says where a node's network is and how it is laid out.
type Config struct {
	NetNS          string // path of the node's network namespace
	APISocket      string // where rootlesskit's API for ports is served
	Dir            string // state, of this package alone; made if missing
	PodCIDR        string // one network, or one of each version of IP with a comma between them; "" is DefaultPodCIDR
	MTU            int    // 0 is DefaultMTU
	Bridge         string // "" is DefaultBridge
	DNS            string // the user-mode network's DNS address as pods reach it; "" = it has none
	HostResolvConf string // "" = none
	Log            *slog.Logger
}

// DefaultBridge is the name of the node's bridge.
const DefaultBridge = "coracle0"

func (c Config) withDefaults() Config {
	if c.PodCIDR == "" {
		c.PodCIDR = DefaultPodCIDR
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Bridge == "" {
		c.Bridge = DefaultBridge
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Network is the node side of the pods' network. Its methods may be called at once from several goroutines.
type Network struct {
	cfg      Config
	node     *node
	rules    *ruleset
	firewall *firewall
	guard    *guard
	ledger   *ledger
	records  recordDir
	ports    *publisher

	cidrMu sync.Mutex // serializes SetPodCIDR and Close: held across system calls, taken before mu

	ops sync.WaitGroup // operations of pods; Add under mu, while not closed

	mu     sync.Mutex         // guards the rest; see doc.go
	pods   map[string]*record // what every pod has, or is about to get
	busy   map[string]bool    // pods with an operation under way
	pools  pools
	closed bool
}

// Open sets the node's side up, or finds it as an earlier daemon left it, and reads the records. Pods that an
// earlier daemon attached stay attached.
func Open(cfg Config) (_ *Network, err error) {
	cfg = cfg.withDefaults()
	n := &Network{cfg: cfg, records: recordDir(filepath.Join(cfg.Dir, "pods")), busy: map[string]bool{}, ports: newPublisher(cfg.APISocket)}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open pod network: %w", errors.Join(err, n.release()))
		}
	}()
	if err := makeDir(string(n.records), cfg.Log); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(cfg.cidrFile() + tempSuffix); err != nil {
		return nil, err
	}
	if n.ledger, err = openLedger(cfg.Dir, cfg.Log); err != nil {
		return nil, err
	}
	var lost []string
	if n.pods, lost, err = n.records.load(cfg.Log); err != nil {
		return nil, err
	}
	if n.node, err = openNode(cfg.NetNS, cfg.MTU); err != nil {
		return nil, err
	}
	more, err := n.openPools()
	if err != nil {
		return nil, err
	}
	lost = append(lost, more...)
	if err := n.node.layBridge(cfg.Bridge, cfg.MTU, hardwareAddr(n.pools.current[0].gateway)); err != nil {
		return nil, err
	}
	if err := n.rebuild(lost); err != nil {
		return nil, err
	}
	if err := n.node.checkGateways(n.pools.all()); err != nil {
		return nil, err
	}
	for _, p := range n.pools.all() {
		if _, err := n.node.addGateway(p); err != nil {
			return nil, err
		}
	}
	if err := n.openFirewall(); err != nil {
		return nil, err
	}
	if err := n.openGuard(); err != nil {
		return nil, err
	}
	if err := n.node.openLoopback(); err != nil { // not before the firewall keeps pods out of it
		return nil, err
	}
	n.warnHidden()
	return n, nil
}

// openFirewall does without IPv6 where the kernel has no nftables for it, unless the pod CIDR was asked to have it. To
// look first would cost a start the 10 ms that the kernel takes to delete what it was tried with.
func (n *Network) openFirewall() error {
	n.rules = &ruleset{ns: n.node.ns}
	n.firewall = &firewall{rules: n.rules, bridge: n.cfg.Bridge, families: n.node.families()}
	err := n.firewall.replace(n.pools.prefixes(), n.allForwards())
	if err == nil || n.node.noIPv6 != nil {
		return err
	}
	n.node.noIPv6 = fmt.Errorf("this kernel has IPv6, and lacks a part of nftables for it: %w", err)
	prefixes, cerr := n.usablePodCIDR(n.savedPodCIDR())
	if cerr != nil {
		return cerr
	}
	n.pools.current = slices.DeleteFunc(n.pools.current, func(p *pool) bool { return !slices.Contains(prefixes, p.prefix) })
	n.firewall.families = n.node.families()
	if n.firewall.replace(n.pools.prefixes(), n.allForwards()) != nil {
		return err // IPv6 is not what is wrong
	}
	return nil
}

func (n *Network) openGuard() error {
	n.guard = &guard{rules: n.rules, mac: n.node.bridge.Attrs().HardwareAddr}
	n.mu.Lock()
	pods := slices.Collect(maps.Values(n.pods))
	n.mu.Unlock()
	if err := n.guard.replace(pods); err != nil {
		return err
	}
	if n.guard.absent != nil {
		n.cfg.Log.Warn("pods with CAP_NET_RAW or CAP_NET_ADMIN can send from the addresses of others", "cause", n.guard.absent)
	}
	return nil
}

func (n *Network) allForwards() []forward {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []forward
	for _, r := range n.pods {
		out = append(out, forwards(r)...)
	}
	return out
}

// Ready tells why pods could not be networked now, or nil. It asks the kernel and the port driver.
func (n *Network) Ready() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	n.mu.Lock()
	closed := n.closed
	n.mu.Unlock()
	if closed {
		return ErrClosed
	}
	return errors.Join(n.node.ready(), n.ports.ready(ctx))
}

// Info is for people: how the network is laid out.
func (n *Network) Info() map[string]string {
	n.mu.Lock()
	defer n.mu.Unlock()
	published := 0
	for _, r := range n.pods {
		published += len(r.Ports)
	}
	var cidrs []netip.Prefix
	var gateways, tables []string
	six := "pods have no IPv6 addresses: network.podCIDR names no IPv6 network"
	for _, p := range n.pools.current {
		cidrs, gateways = append(cidrs, p.prefix), append(gateways, p.gateway.String())
		if familyOf(p.prefix.Addr()) == ipv6 {
			six = "pods reach each other and the node by IPv6; the user-mode network carries IPv4 only"
		}
	}
	if n.node.noIPv6 != nil {
		six = "pods have no IPv6 addresses: " + n.node.noIPv6.Error()
	}
	own := "a pod sends from its own addresses only"
	if n.guard.absent != nil {
		own = "a pod with CAP_NET_RAW or CAP_NET_ADMIN can send from any address: " + n.guard.absent.Error()
	}
	for _, f := range n.node.families() {
		tables = append(tables, f.name+" "+firewallTable)
	}
	return map[string]string{
		"netns": n.cfg.NetNS, "bridge": n.cfg.Bridge, "mtu": strconv.Itoa(n.cfg.MTU), "dns": n.cfg.DNS, "ipv6": six, "sourceAddresses": own,
		"podCIDR": formatPodCIDR(cidrs), "gateway": strings.Join(gateways, ","), "addressTranslation": "nftables tables " + strings.Join(tables, ", "),
		"pods": strconv.Itoa(len(n.pods)), "hostPorts": strconv.Itoa(published),
	}
}

// Close waits for the operations under way, ends the goroutine of the package and closes its sockets. Pods stay
// attached.
func (n *Network) Close() error {
	n.cidrMu.Lock()
	defer n.cidrMu.Unlock()
	n.mu.Lock()
	already := n.closed
	n.closed = true
	n.mu.Unlock()
	if already {
		return nil
	}
	n.ops.Wait()
	return n.release()
}

func (n *Network) release() error {
	n.ports.close()
	var errs []error
	if n.rules != nil {
		errs = append(errs, n.rules.close())
	}
	if n.node != nil {
		errs = append(errs, n.node.close())
	}
	if n.ledger != nil {
		errs = append(errs, n.ledger.Close())
	}
	return errors.Join(errs...)
}
