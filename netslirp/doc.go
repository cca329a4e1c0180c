// Package netslirp is the network of a node and of its pods, without root: a user-mode network program links the
// node's network namespace to the host, a bridge links the pods to it, and ports of the host reach the pods.
//
// Five nouns:
//   - a Driver is a user-mode network by name: both halves of it, for the process outside the user namespace and
//     for the one inside (driver.go);
//   - the Network is the node side of the pods' network: bridge, masquerade, addresses, ports, names;
//   - an Attachment is what a pod got from it;
//   - a record is the same on disk, one JSON file a pod, so that a daemon that comes back gives back exactly that;
//   - a pool is a range of addresses, kept by CNI's host-local allocator and store. New pods get an address of each
//     of the current ones, one for each version of IP (cidr.go).
//
// How a packet goes:
//
//	host network namespace         | node network namespace                       | pod
//	slirp4netns <-------- tap -----+-> tap0  -- masquerade --  coracle0 (gateway) -+- podXXXX == eth0 (address/32, /128)
//	rootlesskit's port driver -----+-> dials the pod's address -------------------^
//
// A pod has its address as a /32 (of IPv6, as a /128) and every route through the gateway, so that traffic between
// two pods is routed by the node and not switched by the bridge. Replies thus pass the node's connection tracking as
// well, and both a host port and a Service answer a pod of the same node, source address kept, without the
// br_netfilter module, which only root can load. Measured, this costs no throughput and 1 µs a round trip.
//
// IPv6 is for pods and the node: the user-mode network carries IPv4. A pod has a route to addresses of private
// networks alone, and what is none of the node's is refused there at once (link.go, firewall.go).
//
// Threads: the daemon lives in the host's network namespace, which its user namespace does not own. setns(2)
// asks for CAP_SYS_ADMIN over the owner of the namespace that is entered, so a thread that left the host's
// namespace cannot come back. Each such thread ends with its goroutine (netns.go), and libraries that enter a
// namespace and restore it (netlink.NewHandleAt, nftables.WithNetNSFd) are not used for that.
//
// State: Network owns Config.Dir (records, host-local's store, the pod CIDR) and is its only writer. The kernel's
// objects are the bridge, links named pod<12 hex digits> with the pod's id as their alias, the nftables table "coracle"
// of bridges, which keeps pods to their addresses (guard.go), permanent neighbours of the bridge, and, for each version
// of IP, the nftables table "coracle" and one routing rule with its table (0x636f). rootlesskit's parent owns the
// published ports; they are told apart by the pod address that they lead to. A pod's TCP server sees the address of a
// client outside the node (portchild.go).
//
// Locks: Network.mu guards the maps in memory and is never held across a system call, a file or the port
// driver; ledger.mu is taken after it, never before. One pod has one operation at a time: a second one is refused.
package netslirp
