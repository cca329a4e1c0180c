package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// Node ports are reached at the node's address, which the host does not have: its packets would have to come through
// the user-mode network, which lets none in. So each node port is published on the host, as a pod's host port is.

// The range that the API server gives node ports from (its default).
const (
	firstNodePort = 30000
	lastNodePort  = 32767
)

// retryWait is the pause after an API server that did not answer.
const retryWait = time.Second

// publisher keeps the host's ports in step with the services.
type publisher struct {
	api     *apiClient
	ports   port.Manager
	nodeIP  string
	address string // of the host, to listen at
	log     *slog.Logger

	told map[nodePort]string // what could not be published, and the reason that was told
}

// nodePort is a port of the node that leads to a service.
type nodePort struct {
	protocol string // tcp or udp
	port     int
}

func runNodePorts(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("nodeports", flag.ContinueOnError)
	config := flags.String("kubeconfig", "", "written by clusterkit pki")
	socket := flags.String("rootlesskit", "", "socket of RootlessKit's API")
	nodeIP := flags.String("node-ip", "", "address of the node")
	address := flags.String("address", "127.0.0.1", "address of the host to listen at")
	if err := flags.Parse(args); err != nil {
		return err
	}
	api, err := newAPIClient(*config)
	if err != nil {
		return err
	}
	rootlesskit, err := client.New(*socket)
	if err != nil {
		return err
	}
	p := &publisher{api: api, ports: rootlesskit.PortManager(), nodeIP: *nodeIP, address: *address,
		log: slog.New(slog.NewTextHandler(os.Stderr, nil)), told: map[nodePort]string{}}
	p.run(ctx)
	return nil
}

// run follows the services until ctx ends. Every change is answered by a look at all of them, of which there are few:
// what was missed while the API server was away is thus made good.
func (p *publisher) run(ctx context.Context) {
	for ctx.Err() == nil {
		services, err := p.api.services(ctx)
		if err == nil {
			err = p.reconcile(ctx, services.Items)
		}
		if err == nil {
			err = p.api.awaitServiceChange(ctx, services.Metadata.ResourceVersion)
		}
		if err != nil && ctx.Err() == nil {
			p.log.Warn("node ports are not followed", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(retryWait):
			}
		}
	}
}

// reconcile publishes what is missing and ends what no service has any more. A port that another program of the host
// holds is told by an event of the service and tried again at the next change.
func (p *publisher) reconcile(ctx context.Context, services []service) error {
	wanted := map[nodePort]service{}
	for _, s := range services {
		for _, sp := range s.Spec.Ports {
			if protocol := strings.ToLower(sp.Protocol); sp.NodePort != 0 && (protocol == "tcp" || protocol == "udp") {
				wanted[nodePort{protocol, sp.NodePort}] = s
			}
		}
	}
	published, err := p.ports.ListPorts(ctx)
	if err != nil {
		return fmt.Errorf("list published ports: %w", err)
	}
	var errs []error
	for _, st := range published {
		if st.Spec.ChildIP != p.nodeIP || st.Spec.ChildPort < firstNodePort || st.Spec.ChildPort > lastNodePort {
			continue // a pod's, or the API server's
		}
		np := nodePort{st.Spec.Proto, st.Spec.ChildPort}
		if _, still := wanted[np]; still {
			delete(wanted, np)
			continue
		}
		p.log.Info("unpublish", "protocol", np.protocol, "port", np.port)
		errs = append(errs, p.ports.RemovePort(ctx, st.ID))
	}
	for np, s := range wanted {
		p.publish(ctx, np, s)
	}
	return errors.Join(errs...)
}

func (p *publisher) publish(ctx context.Context, np nodePort, s service) {
	_, err := p.ports.AddPort(ctx, port.Spec{Proto: np.protocol, ParentIP: p.address, ParentPort: np.port, ChildIP: p.nodeIP, ChildPort: np.port})
	if err == nil {
		p.log.Info("publish", "protocol", np.protocol, "port", np.port, "service", s.Metadata.Namespace+"/"+s.Metadata.Name)
		delete(p.told, np)
		return
	}
	text := fmt.Sprintf("node port %d/%s is not published on the host: %v", np.port, np.protocol, err)
	if p.told[np] == text {
		return
	}
	p.told[np] = text
	p.log.Warn(text, "service", s.Metadata.Namespace+"/"+s.Metadata.Name)
	if err := p.api.warn(ctx, s, "NodePortNotPublished", text); err != nil {
		p.log.Warn("no event of it", "err", err)
	}
}
