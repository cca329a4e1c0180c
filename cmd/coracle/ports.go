package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"

	"github.com/gorilla/mux"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/router"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"github.com/coracle-cri/coracle/rootless"
)

// ownPorts serves RootlessKit's API for ports on a socket that asks who connects. RootlessKit's own, api.sock, asks nobody and
// takes no listener: it is left without ports.
type ownPorts struct {
	port.ParentDriver
	socket string
}

// RunParentDriver serves as long as there are ports. RootlessKit calls it before it lets the daemon start.
func (p ownPorts) RunParentDriver(ready chan struct{}, quit <-chan struct{}, child *port.ChildContext) error {
	listener, err := listenOwn(p.socket, slog.Default())
	if err != nil {
		return fmt.Errorf("serve ports: %w", err)
	}
	r := mux.NewRouter()
	router.AddRoutes(r, &router.Backend{PortDriver: p.ParentDriver})
	server := &http.Server{Handler: r, ReadHeaderTimeout: handshakeTimeout}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(listener) }() // ends with Close
	defer func() { server.Close(); <-served }()
	return p.ParentDriver.RunParentDriver(ready, quit, child)
}

// errOwnPorts is what a daemon of an earlier version is told, too, which was started again below this parent.
var errOwnPorts = errors.New("ports are published by the node alone; where a container needs one, its daemon is of an earlier version than " +
	"the node: start the node again (coracle down, then coracle up)")

// AddPort, ListPorts and RemovePort are what RootlessKit's own socket gives.
func (ownPorts) AddPort(context.Context, port.Spec) (*port.Status, error) { return nil, errOwnPorts }
func (ownPorts) ListPorts(context.Context) ([]port.Status, error)         { return nil, errOwnPorts }
func (ownPorts) RemovePort(context.Context, int) error                    { return errOwnPorts }

// portsSocket is where the daemon publishes ports. A parent of an earlier version has RootlessKit's socket alone.
func portsSocket(node rootless.Node) string {
	if _, err := os.Lstat(node.PortsSocket()); err != nil {
		return node.APISocket()
	}
	return node.PortsSocket()
}
