package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// runPublish makes one port of the host lead to a port of the node, and prints the host's: the API server's.
func runPublish(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("publish", flag.ContinueOnError)
	socket := flags.String("rootlesskit", "", "socket of RootlessKit's API")
	address := flags.String("address", "127.0.0.1", "address of the host to listen at")
	hostPort := flags.Int("port", 0, "port of the host; 0 takes a free one")
	to := flags.String("to", "", "address and port inside the node")
	if err := flags.Parse(args); err != nil {
		return err
	}
	target, err := netip.ParseAddrPort(*to)
	if err != nil {
		return err
	}
	api, err := client.New(*socket)
	if err != nil {
		return err
	}
	published, err := publishOne(ctx, api.PortManager(), port.Spec{Proto: "tcp", ParentIP: *address, ParentPort: *hostPort,
		ChildIP: target.Addr().String(), ChildPort: int(target.Port())})
	if err != nil {
		return err
	}
	fmt.Println(published)
	return nil
}

// publishOne asks the kernel for a free port where none is given. Another program may take it in between: the next try
// asks for another.
func publishOne(ctx context.Context, ports port.Manager, spec port.Spec) (int, error) {
	if spec.ParentPort != 0 {
		_, err := ports.AddPort(ctx, spec)
		return spec.ParentPort, err
	}
	const tries = 5
	var errs []error
	for range tries {
		l, err := net.Listen("tcp", net.JoinHostPort(spec.ParentIP, "0"))
		if err != nil {
			return 0, err
		}
		spec.ParentPort = l.Addr().(*net.TCPAddr).Port
		if err := l.Close(); err != nil {
			return 0, err
		}
		if _, err = ports.AddPort(ctx, spec); err == nil {
			return spec.ParentPort, nil
		}
		errs = append(errs, err)
	}
	return 0, fmt.Errorf("publish the node's port %d: %w", spec.ChildPort, errors.Join(errs...))
}
