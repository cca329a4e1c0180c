package netslirp

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// DefaultPodCIDR is one network of each version of IP. The second is of the range that RFC 4193 leaves to whoever
// wants it, and spells "coracle" in ASCII: packets with such an address never leave the node.
const DefaultPodCIDR = formerPodCIDR + ",fd63:6f72:6163:6c65::/64"

// formerPodCIDR was the default before pods had IPv6 addresses.
const formerPodCIDR = "10.88.0.0/16"

// localIPv6 are the addresses that nobody outside an organization has (RFC 4193).
var localIPv6 = netip.MustParsePrefix("fc00::/7")

// pools are those of which every new pod gets an address, the first for its IP, and those of older pods.
type pools struct {
	current []*pool
	former  []*pool
}

func (p pools) all() []*pool { return slices.Concat(p.current, p.former) }

// prefixes lists the networks of pods, those of new ones first.
func (p pools) prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, p := range p.all() {
		out = append(out, p.prefix)
	}
	return out
}

// parsePodCIDR accepts one network, or one of each version of IP with a comma between them.
func parsePodCIDR(cidrs string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for cidr := range strings.SplitSeq(cidrs, ",") {
		cidr = strings.TrimSpace(cidr)
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, fmt.Errorf("pod CIDR %q: %w: %w", cidr, ErrInvalid, err)
		}
		if prefix.Addr().Is4In6() {
			return nil, fmt.Errorf("pod CIDR %s is IPv4 in the form of IPv6: %w", cidr, ErrInvalid)
		}
		if a := prefix.Addr(); a.IsMulticast() || a.IsLoopback() || a.IsUnspecified() || a.Is6() && a.IsLinkLocalUnicast() {
			return nil, fmt.Errorf("pod CIDR %s has addresses that no pod can have: %w", cidr, ErrInvalid)
		}
		if prefix != prefix.Masked() {
			return nil, fmt.Errorf("pod CIDR %s has host bits set, its network is %s: %w", cidr, prefix.Masked(), ErrInvalid)
		}
		if slices.ContainsFunc(out, func(p netip.Prefix) bool { return familyOf(p.Addr()) == familyOf(prefix.Addr()) }) {
			return nil, fmt.Errorf("pod CIDR %s: two networks of one version of IP: %w", cidrs, ErrInvalid)
		}
		out = append(out, prefix)
	}
	return out, nil
}

// CheckPodCIDR tells, before anything is started, whether a node could take it.
func CheckPodCIDR(cidrs string) error {
	prefixes, err := parsePodCIDR(cmp.Or(cidrs, DefaultPodCIDR))
	if err != nil {
		return err
	}
	_, err = newPools(prefixes, nil)
	return err
}

// usablePodCIDR drops the IPv6 part of the default where this node has no IPv6, and refuses one that was asked for.
func (n *Network) usablePodCIDR(cidrs string) ([]netip.Prefix, error) {
	prefixes, err := parsePodCIDR(cidrs)
	if err != nil || n.node.noIPv6 == nil {
		return prefixes, err
	}
	isIPv6 := func(p netip.Prefix) bool { return familyOf(p.Addr()) == ipv6 }
	if slices.ContainsFunc(prefixes, isIPv6) && cidrs != DefaultPodCIDR {
		return nil, fmt.Errorf("pod CIDR %s: %w: %w", cidrs, ErrUnsupported, n.node.noIPv6)
	}
	return slices.DeleteFunc(prefixes, isIPv6), nil
}

// HiddenFromPods tells which networks of the host pods cannot reach, since the pod CIDR has addresses of theirs too: such
// packets stay in the node. It looks at the routes of the calling thread's network namespace, the host's, as they
// are now: podman's network, of the same default, is there while a container of it runs.
func HiddenFromPods(cidrs string) ([]string, error) {
	prefixes, err := parsePodCIDR(cmp.Or(cidrs, DefaultPodCIDR))
	if err != nil {
		return nil, err
	}
	var hidden []string
	for _, p := range prefixes {
		routes, err := consistent(func() ([]netlink.Route, error) { return netlink.RouteList(nil, familyOf(p.Addr()).number) })
		if err != nil {
			return hidden, fmt.Errorf("list routes of the host: %w", err)
		}
		for _, r := range routes {
			if r.Dst == nil {
				continue
			}
			ones, _ := r.Dst.Mask.Size()
			to := netip.PrefixFrom(addrOf(r.Dst.IP), ones)
			if ones == 0 || !to.Overlaps(p) {
				continue
			}
			name := "by no device"
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
				name = link.Attrs().Name
			}
			hidden = append(hidden, fmt.Sprintf("%s (%s)", to, name))
		}
	}
	return hidden, nil
}

func formatPodCIDR(prefixes []netip.Prefix) string {
	words := make([]string, len(prefixes))
	for i, p := range prefixes {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

// cidrState is the file that carries a pod CIDR which the kubelet set over a restart of the daemon.
type cidrState struct {
	Version    int    `json:"version"`
	Configured string `json:"configured"` // as the configuration said when Current was set
	Current    string `json:"current"`
}

// cidrVersion is that of cidrState.
const cidrVersion = 1

func (c Config) cidrFile() string { return filepath.Join(c.Dir, "podcidr.json") }

// savedPodCIDR is what the kubelet set, else what the configuration says.
func (n *Network) savedPodCIDR() string {
	var saved cidrState
	switch err := readJSON(n.cfg.cidrFile(), &saved); {
	case errors.Is(err, fs.ErrNotExist):
		return n.cfg.PodCIDR
	case err != nil:
		setAside(n.cfg.cidrFile(), err, n.cfg.Log)
		return n.cfg.PodCIDR
	}
	if _, err := parsePodCIDR(saved.Current); err != nil || saved.Version != cidrVersion {
		setAside(n.cfg.cidrFile(), errors.Join(fmt.Errorf("version %d", saved.Version), err), n.cfg.Log)
		return n.cfg.PodCIDR
	}
	unchanged := saved.Configured == n.cfg.PodCIDR || saved.Configured == formerPodCIDR && n.cfg.PodCIDR == DefaultPodCIDR
	if !unchanged {
		return n.cfg.PodCIDR
	}
	return saved.Current
}

// openPools finds the pod CIDR in force and those of older pods, and reserves what the records say. A record whose
// addresses cannot be, or are another pod's, is set aside too; lost are the pods of those.
func (n *Network) openPools() (lost []string, err error) {
	current, err := n.usablePodCIDR(n.savedPodCIDR())
	if err != nil {
		return nil, err
	}
	if n.pools.current, err = newPools(current, n.ledger); err != nil {
		return nil, err
	}
	for id, r := range n.pods {
		if err := n.openPool(r); err != nil {
			setAside(n.records.path(id), err, n.cfg.Log)
			delete(n.pods, id)
			lost = append(lost, id)
		}
	}
	return lost, nil
}

// openPool makes a pool of each network that the pod's addresses are of, and reserves those.
func (n *Network) openPool(r *record) error {
	var former []netip.Prefix
	for _, a := range r.Addresses {
		if p := a.Masked(); !slices.Contains(n.pools.prefixes(), p) && !slices.Contains(former, p) {
			former = append(former, p)
		}
	}
	more, err := newPools(former, n.ledger)
	if err != nil {
		return err
	}
	if err := n.ledger.ensure(r, func(id string) bool { return n.pods[id] != nil }); err != nil {
		return err
	}
	n.pools.former = append(n.pools.former, more...)
	return nil
}

// SetPodCIDR makes new pods take their addresses from cidr, also after a restart: one network, or one of each version
// of IP with a comma between them, the one of the pods' IP first. Pods that have addresses keep them, and their
// gateways. An empty cidr changes nothing (CRI NetworkConfig), nor does one that is refused.
func (n *Network) SetPodCIDR(cidr string) error {
	if cidr == "" {
		return nil
	}
	prefixes, err := n.usablePodCIDR(cidr)
	if err != nil {
		return err
	}
	n.cidrMu.Lock()
	defer n.cidrMu.Unlock()
	n.mu.Lock()
	old, closed := n.pools, n.closed
	n.mu.Unlock()
	if closed {
		return fmt.Errorf("set pod CIDR: %w", ErrClosed)
	}
	if slices.Equal(prefixes, (pools{current: old.current}).prefixes()) {
		return nil
	}
	next := pools{}
	if next.current, err = newPools(prefixes, n.ledger); err != nil {
		return err
	}
	for _, p := range old.all() {
		if !slices.Contains(prefixes, p.prefix) {
			next.former = append(next.former, p)
		}
	}
	if err := n.layPools(old, next); err != nil {
		return err
	}
	n.mu.Lock()
	n.pools = next
	n.mu.Unlock()
	n.warnHidden()
	return nil
}

// layPools readies the bridge, the firewall and the next daemon for the next pools. On an error all three are as before.
func (n *Network) layPools(old, next pools) (err error) {
	current := pools{current: next.current}.prefixes()
	raw, err := json.Marshal(cidrState{Version: cidrVersion, Configured: n.cfg.PodCIDR, Current: formatPodCIDR(current)})
	if err != nil {
		return fmt.Errorf("encode pod CIDR: %w", err)
	}
	if err := n.node.checkGateways(next.current); err != nil {
		return err
	}
	var back undo
	defer func() {
		if err != nil {
			err = errors.Join(err, back.run(context.Background()))
		}
	}()
	for _, p := range next.current {
		fresh, err := n.node.addGateway(p)
		if err != nil {
			return err
		}
		if fresh {
			back.push(func(context.Context) error { return n.node.dropGateway(p) })
		}
	}
	if err := n.firewall.masquerade(next.prefixes()); err != nil {
		return err
	}
	back.push(func(context.Context) error { return n.firewall.masquerade(old.prefixes()) })
	return writeFile(n.cfg.cidrFile(), raw)
}

// warnHidden says in the log what HiddenFromPods finds.
func (n *Network) warnHidden() {
	n.mu.Lock()
	cidr := formatPodCIDR(pools{current: n.pools.current}.prefixes())
	n.mu.Unlock()
	hidden, err := HiddenFromPods(cidr)
	if err != nil {
		n.cfg.Log.Warn("whether the pod CIDR hides a network of the host cannot be told", "error", err)
	} else if len(hidden) > 0 {
		n.cfg.Log.Warn("pods cannot reach networks of the host that the pod CIDR overlaps; if they should, set network.podCIDR to another",
			"podCIDR", cidr, "hidden", hidden)
	}
}
