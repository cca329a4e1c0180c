package netslirp

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// retiredGroup is the interface group of links that wait to be deleted.
const retiredGroup = 0xc07ac1e

// reaper deletes retired links, all that there are in one request: the kernel's wait of some 30 ms, for readers of
// the devices to be done, is then paid once and by nobody who waits. It owns one goroutine.
type reaper struct {
	socket *nl.NetlinkSocket
	wake   chan struct{}
	quit   chan struct{}
	done   chan struct{}
}

// startReaper is called on a thread inside the node's namespace.
func startReaper() (*reaper, error) {
	// With no namespace given this is a plain socket in the thread's own.
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket of the reaper: %w", err)
	}
	r := &reaper{socket: s, wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{})}
	go r.run()
	return r, nil
}

func (r *reaper) run() {
	defer close(r.done)
	for {
		select {
		case <-r.wake:
			r.reap()
		case <-r.quit:
			r.reap()
			return
		}
	}
}

// kick makes the goroutine look. It does not block.
func (r *reaper) kick() {
	select {
	case r.wake <- struct{}{}:
	default: // it is about to look
	}
}

// close deletes what is retired, ends the goroutine and waits for it.
func (r *reaper) close() {
	close(r.quit)
	<-r.done
	r.socket.Close()
}

// reap has nobody to report to: what fails stays in the group, cut off from the network, and is tried again with
// the next pod, at the next start, or goes with its pod's namespace.
func (r *reaper) reap() { _ = deleteGroup(r.socket, retiredGroup) }

// deleteGroup deletes every link of the group (rtnetlink(7): RTM_DELLINK with IFLA_GROUP and no index).
func deleteGroup(s *nl.NetlinkSocket, group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENODEV) {
		return nil // the group is empty
	}
	return err
}
