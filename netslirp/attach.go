package netslirp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
)

// AttachRequest asks for a pod's network.
type AttachRequest struct {
	PodID string
	NetNS string // path of the pod's network namespace, which somebody else makes and removes
	Ports []PortMapping
}

// Attachment is what the pod got.
type Attachment struct {
	IP            string
	AdditionalIPs []string // of other IP families
}

// Attach gives the pod an interface, an address, routes and its host ports. On error it has taken back what it did.
func (n *Network) Attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	got, err := n.attach(ctx, req)
	if err != nil {
		return Attachment{}, fmt.Errorf("attach pod %s: %w", req.PodID, err)
	}
	return got, nil
}

func (n *Network) attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	if !podIDForm.MatchString(req.PodID) {
		return Attachment{}, fmt.Errorf("pod id: %w", ErrInvalid)
	}
	ports, err := normalize(req.Ports)
	if err != nil {
		return Attachment{}, err
	}
	netns, err := openNetNS(req.NetNS)
	if err != nil {
		return Attachment{}, err
	}
	defer netns.Close()
	r, p, err := n.claim(req.PodID, ports)
	if err != nil {
		return Attachment{}, err
	}
	defer n.end(r.PodID)
	if err := n.take(ctx, r, p, netns); err != nil {
		n.forget(r.PodID)
		return Attachment{}, err
	}
	return Attachment{IP: r.ip().String()}, nil
}

// take gets everything that the claim is for, or nothing.
func (n *Network) take(ctx context.Context, r *record, p *pool, netns *os.File) (err error) {
	var u undo
	defer func() {
		if err != nil {
			err = errors.Join(err, u.run(ctx))
		}
	}()
	ip, err := p.take(r.PodID)
	if err != nil {
		return err
	}
	u.push(func(context.Context) error { return n.ledger.release(r.PodID) })
	n.setAddress(r, ip)
	if err := n.records.save(r); err != nil {
		return err
	}
	u.push(func(context.Context) error { return n.records.remove(r.PodID) })

	u.push(func(context.Context) error { return n.node.remove(r.Link) }) // first: plug may fail half way
	if err := n.node.plug(r, netns, p.gateway); err != nil {
		return err
	}
	return n.publish(ctx, r, &u)
}

// claim enters the pod and its host ports in memory, or says who has them.
func (n *Network) claim(podID string, ports []PortMapping) (*record, *pool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.closed:
		return nil, nil, ErrClosed
	case n.busy[podID]:
		return nil, nil, ErrBusy
	case n.pods[podID] != nil:
		return nil, nil, ErrAttached
	}
	for _, m := range ports {
		for _, other := range n.pods {
			if slices.ContainsFunc(other.Ports, m.overlaps) {
				return nil, nil, fmt.Errorf("publish host port %s: pod %s has it: %w", m, other.PodID, ErrPortInUse)
			}
		}
	}
	p := n.pools[len(n.pools)-1]
	r := &record{Version: recordVersion, PodID: podID, Link: newLink(), Prefix: p.prefix, Ports: ports, Addresses: []netip.Addr{{}}}
	n.pods[podID] = r
	n.beginLocked(podID)
	return r, p, nil
}

// beginLocked is called with mu held. Each call has one of end.
func (n *Network) beginLocked(podID string) {
	n.busy[podID] = true
	n.ops.Add(1)
}

func (n *Network) end(podID string) {
	n.mu.Lock()
	delete(n.busy, podID)
	n.mu.Unlock()
	n.ops.Done()
}

func (n *Network) setAddress(r *record, ip netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r.Addresses = []netip.Addr{ip}
}

func (n *Network) forget(podID string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pods, podID)
}

// publish opens the pod's ports on the host, and inside the node for other pods.
func (n *Network) publish(ctx context.Context, r *record, u *undo) error {
	if len(r.Ports) == 0 {
		return nil
	}
	inside := forwards(r.ip(), r.Ports)
	u.push(func(context.Context) error { return n.firewall.remove(inside) })
	if err := n.firewall.add(inside); err != nil {
		return err
	}
	u.push(func(ctx context.Context) error { return n.ports.unpublish(ctx, r.ip()) })
	for _, m := range r.Ports {
		if err := n.ports.publish(ctx, r.ip(), m); err != nil {
			return err
		}
	}
	return nil
}

// Detach gives back what the pod has, its address last, so that nobody gets it while something still leads to it.
// It is idempotent: a pod without network is detached. On error the rest is still on record and Detach can be
// called again. The namespace at netNS may be gone.
func (n *Network) Detach(ctx context.Context, podID, netNS string) error {
	n.mu.Lock()
	r := n.pods[podID]
	switch {
	case n.closed:
		n.mu.Unlock()
		return fmt.Errorf("detach pod %s: %w", podID, ErrClosed)
	case n.busy[podID]:
		n.mu.Unlock()
		return fmt.Errorf("detach pod %s: %w", podID, ErrBusy)
	case r == nil:
		n.mu.Unlock()
		return nil
	}
	n.beginLocked(podID)
	n.mu.Unlock()
	defer n.end(podID)
	if err := n.giveBack(ctx, r); err != nil {
		return fmt.Errorf("detach pod %s from %s: %w", podID, netNS, err)
	}
	n.forget(podID)
	return nil
}

func (n *Network) giveBack(ctx context.Context, r *record) error {
	if len(r.Ports) > 0 {
		if err := n.ports.unpublish(ctx, r.ip()); err != nil {
			return err
		}
		if err := n.firewall.remove(forwards(r.ip(), r.Ports)); err != nil {
			return err
		}
	}
	if err := n.node.unplug(r.Link); err != nil {
		return err
	}
	if err := n.ledger.release(r.PodID); err != nil {
		return err
	}
	return n.records.remove(r.PodID)
}

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
	n.mu.Lock()
	pods, busy := maps.Clone(n.pods), maps.Clone(n.busy)
	n.mu.Unlock()

	var errs []error
	known := map[string]bool{}
	for id, r := range pods {
		known[r.Link] = true
		if !live[id] && !busy[id] {
			errs = append(errs, n.Detach(ctx, id, ""))
		}
	}
	for _, link := range links {
		if !known[link] {
			errs = append(errs, n.node.unplug(link))
		}
	}
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

// unpublishStrays ends published ports that lead to an address of ours that no pod has.
func (n *Network) unpublishStrays(ctx context.Context) error {
	prefixes := n.prefixes()
	return n.ports.unpublishIf(ctx, func(childIP netip.Addr) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, r := range n.pods {
			if r.ip() == childIP {
				return false
			}
		}
		return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(childIP) })
	})
}
