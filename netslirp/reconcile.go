package netslirp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// Reconcile gives back what belongs to no live pod: after a crash, before new pods come. It does all that it can
// and reports all that failed.
func (n *Network) Reconcile(ctx context.Context, live map[string]bool) error {
	// What the kernel and the disk have is listed first: what a pod gets after that is not in these lists, and
	// what it got before is in n.pods, where it is entered first of all.
	links, err := n.node.links()
	if err != nil {
		return fmt.Errorf("reconcile network: %w", err)
	}
	owners := n.ledger.owners()
	errs := []error{n.restorePorts(ctx)}
	n.mu.Lock()
	pods, busy := maps.Clone(n.pods), maps.Clone(n.busy)
	n.mu.Unlock()

	known := map[string]bool{}
	for id, r := range pods {
		known[r.Link] = true
		if !live[id] && !busy[id] {
			errs = append(errs, n.Detach(ctx, id, ""))
		}
	}
	for link := range links {
		if !known[link] {
			errs = append(errs, n.node.unplug(link))
		}
	}
	errs = append(errs, n.forgetStrays()) // before their addresses are free for others
	for _, id := range owners {
		if pods[id] == nil { // host-local wrote it, the crash came before our record
			errs = append(errs, n.ledger.release(id))
		}
	}
	errs = append(errs, n.unpublishStrays(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("reconcile network: %w", err)
	}
	return nil
}

// forgetStrays takes away neighbours with an address that no pod has: of a pod whose record is gone.
func (n *Network) forgetStrays() error {
	neighbours, err := n.node.neighbours()
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	of := map[netip.Addr]bool{}
	for _, r := range n.pods {
		for _, a := range r.Addresses {
			of[a.Addr()] = true
		}
	}
	var strays []netip.Prefix
	for _, ip := range neighbours {
		if !of[ip] {
			strays = append(strays, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	return n.node.forgetNeighbours(strays)
}

// unpublishStrays ends published ports that lead to an address of ours that no pod has.
func (n *Network) unpublishStrays(ctx context.Context) error {
	return n.ports.unpublishIf(ctx, func(childIP netip.Addr) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, r := range n.pods {
			if r.has(childIP) {
				return false
			}
		}
		return slices.ContainsFunc(n.pools.prefixes(), func(p netip.Prefix) bool { return p.Contains(childIP) })
	})
}

// rebuild makes the records of pods whose own could not be read from what the kernel and the address store have of
// them. A pod of which too little is left to be seen is one without network: Reconcile takes the rest of it.
func (n *Network) rebuild(lost []string) error {
	if len(lost) == 0 {
		return nil
	}
	links, err := n.node.links()
	if err != nil {
		return err
	}
	for link, id := range links {
		addresses := n.ledger.addresses(id)
		if !slices.Contains(lost, id) || len(addresses) == 0 {
			continue
		}
		r := &record{Version: recordVersion, PodID: id, Link: link, Portless: true}
		for _, a := range addresses {
			r.Addresses = append(r.Addresses, n.pools.network(a))
		}
		n.cfg.Log.Warn("network record made again", "pod", id, "link", link, "addresses", r.Addresses)
		n.pods[id] = r
		if err := n.records.save(r); err != nil {
			return err
		}
	}
	return nil
}

// network is the address with the length of its pod CIDR.
func (p pools) network(a netip.Addr) netip.Prefix {
	for _, prefix := range p.prefixes() {
		if prefix.Contains(a) {
			return netip.PrefixFrom(a, prefix.Bits())
		}
	}
	return hostPrefix(a)
}

// restorePorts enters in the records that were made again what the port driver has for their pods.
func (n *Network) restorePorts(ctx context.Context) error {
	found := map[*record][]PortMapping{}
	n.mu.Lock()
	for _, r := range n.pods {
		if r.Portless {
			found[r] = nil
		}
	}
	n.mu.Unlock()
	if len(found) == 0 {
		return nil
	}
	err := n.ports.each(ctx, func(st port.Status, childIP netip.Addr) {
		for r := range found {
			if r.has(childIP) {
				found[r] = append(found[r], PortMapping{Protocol: strings.TrimRight(st.Spec.Proto, "46"), HostIP: st.Spec.ParentIP,
					HostPort: st.Spec.ParentPort, ContainerPort: st.Spec.ChildPort})
			}
		}
	})
	if err != nil {
		return err
	}
	var errs []error
	for r, ports := range found {
		n.mu.Lock()
		r.Ports, r.Portless = ports, false
		n.mu.Unlock()
		errs = append(errs, n.firewall.add(forwards(r)), n.records.save(r))
	}
	return errors.Join(errs...)
}
