package netslirp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Config says where a node's network is and how it is laid out.
type Config struct {
	NetNS          string // path of the node's network namespace
	APISocket      string // rootlesskit's API socket
	Dir            string // state, of this package alone; made if missing
	PodCIDR        string // "" is DefaultPodCIDR
	MTU            int    // 0 is DefaultMTU
	Bridge         string // "" is DefaultBridge
	DNS            string // the user-mode network's DNS address as pods reach it; "" = it has none
	HostResolvConf string // "" = none
	Log            *slog.Logger
}

// Defaults of Config.
const (
	DefaultPodCIDR = "10.88.0.0/16"
	DefaultBridge  = "coracle0"
)

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
	firewall *firewall
	ledger   *ledger
	records  recordDir
	ports    *publisher

	cidrMu sync.Mutex // serializes SetPodCIDR and Close: held across system calls, taken before mu

	ops sync.WaitGroup // operations of pods; Add under mu, while not closed

	mu     sync.Mutex         // guards the rest; see doc.go
	pods   map[string]*record // what every pod has, or is about to get
	busy   map[string]bool    // pods with an operation under way
	pools  []*pool            // the last one serves new pods; those before, pods that have an address of theirs
	closed bool
}

// cidrState is the file that carries a pod CIDR which the kubelet set over a restart of the daemon.
type cidrState struct {
	Version    int    `json:"version"`
	Configured string `json:"configured"` // as the configuration said when Current was set
	Current    string `json:"current"`
}

func (c Config) cidrFile() string { return filepath.Join(c.Dir, "podcidr.json") }

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
	if err := os.MkdirAll(string(n.records), 0o700); err != nil {
		return nil, err
	}
	if n.ledger, err = openLedger(cfg.Dir); err != nil {
		return nil, err
	}
	if n.pods, err = n.records.load(); err != nil {
		return nil, err
	}
	if err := n.openPools(); err != nil {
		return nil, err
	}
	current := n.pools[len(n.pools)-1]
	if n.node, err = openNode(cfg.NetNS, cfg.Bridge, cfg.MTU, current.gateway); err != nil {
		return nil, err
	}
	for _, p := range n.pools {
		if err := n.node.addGateway(p); err != nil {
			return nil, err
		}
	}
	n.firewall = &firewall{ns: n.node.ns, bridge: cfg.Bridge}
	if err := n.firewall.replace(n.prefixes(), n.allForwards()); err != nil {
		return nil, err
	}
	if err := n.node.routeLoopback(); err != nil {
		return nil, err
	}
	return n, nil
}

// openPools finds the pod CIDR in force and those of older pods, and reserves what the records say.
func (n *Network) openPools() error {
	cidr := n.cfg.PodCIDR
	var saved cidrState
	switch err := readJSON(n.cfg.cidrFile(), &saved); {
	case err == nil && saved.Version == recordVersion && saved.Configured == n.cfg.PodCIDR:
		cidr = saved.Current
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	current, err := parsePodCIDR(cidr)
	if err != nil {
		return err
	}
	prefixes := []netip.Prefix{}
	for _, r := range n.pods {
		if err := n.ledger.ensure(r); err != nil {
			return err
		}
		if r.Prefix != current && !slices.Contains(prefixes, r.Prefix) {
			prefixes = append(prefixes, r.Prefix)
		}
	}
	for _, prefix := range append(prefixes, current) {
		p, err := newPool(prefix, n.ledger)
		if err != nil {
			return err
		}
		n.pools = append(n.pools, p)
	}
	return nil
}

func (n *Network) prefixes() []netip.Prefix {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []netip.Prefix
	for _, p := range n.pools {
		out = append(out, p.prefix)
	}
	return out
}

func (n *Network) allForwards() []forward {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []forward
	for _, r := range n.pods {
		out = append(out, forwards(r.ip(), r.Ports)...)
	}
	return out
}

// SetPodCIDR makes new pods take their addresses from cidr, also after a restart. Pods that have an address keep
// it, and their gateway. An empty cidr changes nothing (CRI NetworkConfig).
func (n *Network) SetPodCIDR(cidr string) error {
	if cidr == "" {
		return nil
	}
	prefix, err := parsePodCIDR(cidr)
	if err != nil {
		return err
	}
	n.cidrMu.Lock()
	defer n.cidrMu.Unlock()
	n.mu.Lock()
	pools, closed := slices.Clone(n.pools), n.closed
	n.mu.Unlock()
	if closed {
		return fmt.Errorf("set pod CIDR: %w", ErrClosed)
	}
	if pools[len(pools)-1].prefix == prefix {
		return nil
	}
	p, err := newPool(prefix, n.ledger)
	if err != nil {
		return err
	}
	if err := n.node.addGateway(p); err != nil {
		return err
	}
	pools = append(slices.DeleteFunc(pools, func(old *pool) bool { return old.prefix == prefix }), p)
	prefixes := make([]netip.Prefix, len(pools))
	for i, p := range pools {
		prefixes[i] = p.prefix
	}
	if err := n.firewall.masquerade(prefixes); err != nil {
		return err
	}
	raw, err := json.Marshal(cidrState{Version: recordVersion, Configured: n.cfg.PodCIDR, Current: prefix.String()})
	if err != nil {
		return fmt.Errorf("encode pod CIDR: %w", err)
	}
	if err := writeFile(n.cfg.cidrFile(), raw); err != nil {
		return err
	}
	n.mu.Lock()
	n.pools = pools
	n.mu.Unlock()
	return nil
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
	current, published := n.pools[len(n.pools)-1], 0
	for _, r := range n.pods {
		published += len(r.Ports)
	}
	return map[string]string{
		"netns": n.cfg.NetNS, "bridge": n.cfg.Bridge, "mtu": strconv.Itoa(n.cfg.MTU), "dns": n.cfg.DNS,
		"podCIDR": current.prefix.String(), "gateway": current.gateway.String(), "addressTranslation": "nftables table ip " + firewallTable,
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
	if n.node != nil {
		errs = append(errs, n.node.close())
	}
	if n.ledger != nil {
		errs = append(errs, n.ledger.Close())
	}
	return errors.Join(errs...)
}
