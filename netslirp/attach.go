package netslirp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/coracle-cri/coracle/e2e/crash"
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
	r, current, err := n.claim(req.PodID, ports)
	if err != nil {
		return Attachment{}, err
	}
	defer n.end(r.PodID)
	if err := n.take(ctx, r, current, netns); err != nil {
		n.forget(r.PodID)
		return Attachment{}, err
	}
	got := Attachment{IP: r.ip().String()}
	for _, a := range r.Addresses[1:] {
		got.AdditionalIPs = append(got.AdditionalIPs, a.Addr().String())
	}
	return got, nil
}

// take gets everything that the claim is for, or nothing.
func (n *Network) take(ctx context.Context, r *record, current []*pool, netns *os.File) (err error) {
	var u undo
	defer func() {
		if err != nil {
			err = errors.Join(err, u.run(ctx))
		}
	}()
	u.push(func(context.Context) error { return n.ledger.release(r.PodID) }) // first: there may be two to take
	var addresses []netip.Prefix
	for _, p := range current {
		a, err := p.take(r.PodID)
		if err != nil {
			return err
		}
		addresses = append(addresses, a)
	}
	n.setAddresses(r, addresses)
	if err := n.records.save(r); err != nil {
		return err
	}
	u.push(func(context.Context) error { return n.records.remove(r.PodID) })

	u.push(func(context.Context) error { return n.guard.forbid(r) })
	if err := n.guard.allow(r); err != nil {
		return err
	}
	u.push(func(context.Context) error { // first: plug may fail half way
		return errors.Join(n.node.remove(r.Link), n.node.forgetNeighbours(r.Addresses))
	})
	refused, err := n.node.plug(r, netns)
	if err != nil {
		return err
	}
	if err := n.doWithout(r, refused); err != nil {
		return err
	}
	return n.publish(ctx, r, &u)
}

// doWithout takes back addresses that the pod's namespace refused.
func (n *Network) doWithout(r *record, refused []netip.Prefix) error {
	if len(refused) == 0 {
		return nil
	}
	left := slices.DeleteFunc(slices.Clone(r.Addresses), func(a netip.Prefix) bool { return slices.Contains(refused, a) })
	if len(left) == 0 {
		return fmt.Errorf("give %s an address of %s, the only pod CIDR: a sysctl of the pod disables IPv6: %w",
			podInterface, refused[0].Masked(), ErrInvalid)
	}
	if err := errors.Join(n.guard.forbid(r), n.node.forgetNeighbours(refused)); err != nil {
		return err
	}
	n.setAddresses(r, left)
	if err := n.guard.allow(r); err != nil {
		return err
	}
	if err := n.records.save(r); err != nil {
		return err
	}
	for _, a := range refused {
		if err := n.ledger.drop(r.PodID, a.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// claim enters the pod and its host ports in memory, or says who has them.
func (n *Network) claim(podID string, ports []PortMapping) (*record, []*pool, error) {
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
	r := &record{Version: recordVersion, PodID: podID, Link: newLink(), Ports: ports}
	n.pods[podID] = r
	n.beginLocked(podID)
	return r, n.pools.current, nil
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

func (n *Network) setAddresses(r *record, addresses []netip.Prefix) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r.Addresses = addresses
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
	inside := forwards(r)
	u.push(func(context.Context) error { return n.firewall.remove(inside) })
	if err := n.firewall.add(inside); err != nil {
		return err
	}
	crash.Point("net/forwards-added")
	u.push(func(ctx context.Context) error { return n.ports.unpublish(ctx, r) })
	for _, m := range r.Ports {
		if ip, err := netip.ParseAddr(m.HostIP); err == nil && n.node.has(ip) {
			continue // the firewall has it; the host has no such address
		}
		if err := n.ports.publish(ctx, m.target(r), m); err != nil {
			return err
		}
		crash.Point("net/port-published")
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
		if err := n.ports.unpublish(ctx, r); err != nil {
			return err
		}
		crash.Point("net/ports-unpublished")
		if err := n.firewall.remove(forwards(r)); err != nil {
			return err
		}
		crash.Point("net/forwards-removed")
	}
	if err := errors.Join(n.node.unplug(r.Link), n.node.forgetNeighbours(r.Addresses), n.guard.forbid(r)); err != nil {
		return err
	}
	if err := n.ledger.release(r.PodID); err != nil {
		return err
	}
	return n.records.remove(r.PodID)
}
