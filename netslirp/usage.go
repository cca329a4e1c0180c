package netslirp

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// Traffic is what an interface of a pod has carried, as the pod sees it.
type Traffic struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Usage returns the traffic of the default interface of each attached pod, by pod id, from one dump of the node's
// interfaces. A pod that is being attached or detached, or whose namespace is gone, may be missing.
func (n *Network) Usage() (map[string]Traffic, error) {
	owners := map[string]string{} // link → pod
	n.mu.Lock()
	closed := n.closed
	for id, r := range n.pods {
		owners[r.Link] = id
	}
	n.mu.Unlock()
	if closed {
		return nil, fmt.Errorf("read traffic of pods: %w", ErrClosed)
	}
	links, err := consistent(n.node.route.LinkList)
	if err != nil {
		return nil, fmt.Errorf("read traffic of pods: %w", err)
	}
	usage := make(map[string]Traffic, len(owners))
	for _, l := range links {
		id, s := owners[l.Attrs().Name], l.Attrs().Statistics
		if id == "" || s == nil {
			continue
		}
		// What the node's end of a veth receives the pod has sent, and the other way round.
		usage[id] = Traffic{Name: podInterface,
			RxBytes: s.TxBytes, RxPackets: s.TxPackets, RxErrors: s.TxErrors, RxDropped: s.TxDropped,
			TxBytes: s.RxBytes, TxPackets: s.RxPackets, TxErrors: s.RxErrors, TxDropped: s.RxDropped}
	}
	return usage, nil
}

// consistent repeats a dump that the kernel says was changed under it (NLM_F_DUMP_INTR): such a one may lack what
// was there all the time. Pods come and go while others are listed.
func consistent[T any](list func() ([]T, error)) (all []T, err error) {
	for range 20 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, err
}
