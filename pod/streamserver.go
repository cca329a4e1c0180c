package pod

import (
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/coracle-cri/coracle/pod/streaming"
)

// portAttempts bounds the search for a port that is free in both network namespaces.
const portAttempts = 20

// openStreams serves exec, attach and port-forward. One port is listened on twice: on the loopback of the host,
// for crictl outside, and on that of the node's network namespace, for a kubelet inside.
func openStreams(s *Service, addr string) (*streaming.Server, error) {
	host, node, err := listenBoth(s.deps.Network, addr)
	if err != nil {
		return nil, fmt.Errorf("open streaming server: %w", err)
	}
	return streaming.Serve(&streamRuntime{s}, s.cfg.Log, host, node), nil
}

// listenBoth finds a port that is free in both namespaces. A port that was asked for is tried alone.
func listenBoth(network NodeSockets, addr string) (host, node net.Listener, err error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, nil, fmt.Errorf("listen on %q: %w", addr, err)
	}
	for range portAttempts {
		if host, err = net.Listen("tcp", addr); err != nil {
			return nil, nil, fmt.Errorf("listen on the host: %w", err)
		}
		if node, err = network.ListenNode(host.Addr().String()); err == nil {
			return host, node, nil
		}
		err = errors.Join(fmt.Errorf("listen on %s in the node's network namespace: %w", host.Addr(), err), host.Close())
		if port != "0" || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, nil, err
}
