package netslirp

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"golang.org/x/sys/unix"
)

// PortMapping asks for a port of the host that leads to a port of the pod.
type PortMapping struct {
	Protocol      string `json:"protocol"` // "tcp" or "udp"; "" is tcp
	HostPort      int    `json:"hostPort"` // 0 asks for nothing
	ContainerPort int    `json:"containerPort"`
	HostIP        string `json:"hostIP,omitempty"` // "" is every address of the host
}

func (m PortMapping) String() string {
	return net.JoinHostPort(m.HostIP, strconv.Itoa(m.HostPort)) + "/" + m.Protocol
}

// normalize returns the mappings that ask for a host port, checked.
func normalize(mappings []PortMapping) ([]PortMapping, error) {
	var out []PortMapping
	for _, m := range mappings {
		if m.HostPort == 0 {
			continue
		}
		m.Protocol = strings.ToLower(m.Protocol)
		if m.Protocol == "" {
			m.Protocol = "tcp"
		}
		switch {
		case m.Protocol == "sctp":
			return nil, fmt.Errorf("publish host port %s: no user-mode network carries SCTP; use TCP or UDP, or drop the host port: %w", m, ErrUnsupported)
		case m.Protocol != "tcp" && m.Protocol != "udp":
			return nil, fmt.Errorf("publish host port %s: unknown protocol: %w", m, ErrInvalid)
		case m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort <= 0 || m.ContainerPort > 65535:
			return nil, fmt.Errorf("publish host port %s to port %d: a port is 1 to 65535: %w", m, m.ContainerPort, ErrInvalid)
		}
		if m.HostIP != "" {
			addr, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return nil, fmt.Errorf("publish host port %s: %w: %w", m, ErrInvalid, err)
			}
			if addr.Zone() != "" {
				return nil, fmt.Errorf("publish host port %s: the port driver takes no address with a zone: %w", m, ErrInvalid)
			}
		}
		for _, other := range out {
			if other.overlaps(m) {
				return nil, fmt.Errorf("publish host port %s: the same pod asks for %s: %w", m, other, ErrPortInUse)
			}
		}
		out = append(out, m)
	}
	return out, nil
}

// families tells which IP versions the mapping's address covers, and whether it is all addresses of them.
func (m PortMapping) families() (v4, v6, all bool) {
	if m.HostIP == "" {
		return true, true, true
	}
	addr := netip.MustParseAddr(m.HostIP).Unmap()
	return addr.Is4(), addr.Is6(), addr.IsUnspecified()
}

// overlaps tells whether the kernel would refuse to bind both (EADDRINUSE).
func (m PortMapping) overlaps(o PortMapping) bool {
	if m.Protocol != o.Protocol || m.HostPort != o.HostPort {
		return false
	}
	m4, m6, mAll := m.families()
	o4, o6, oAll := o.families()
	shared := m4 && o4 || m6 && o6
	if !shared {
		return false
	}
	return mAll || oAll || netip.MustParseAddr(m.HostIP).Unmap() == netip.MustParseAddr(o.HostIP).Unmap()
}

// target is the pod's address that the port on the host leads to: of the version of IP that the mapping asks for,
// where the pod has one. The port driver takes a connection before it knows whether the pod listens, so a port for
// every address leads to where most programs do: one that listens on 0.0.0.0 and one that listens on :: both
// answer at the IPv4 address.
func (m PortMapping) target(r *record) netip.Addr {
	if v4, _, _ := m.families(); v4 {
		return r.address(ipv4)
	}
	return r.address(ipv6)
}

// spec is the mapping as rootlesskit takes it. There "tcp" with 0.0.0.0 would listen by IPv6 as well.
func (m PortMapping) spec(pod netip.Addr) port.Spec {
	proto := m.Protocol
	switch v4, v6, _ := m.families(); {
	case v4 && !v6:
		proto += "4"
	case v6 && !v4:
		proto += "6"
	}
	return port.Spec{Proto: proto, ParentIP: m.HostIP, ParentPort: m.HostPort, ChildIP: pod.String(), ChildPort: m.ContainerPort}
}

// forwards are the host ports of the pod at the node's own addresses. Address translation stays within a version of
// IP: each of the pod's addresses has what is asked for its own.
func forwards(r *record) []forward {
	var out []forward
	for _, m := range r.Ports {
		protocol := byte(unix.IPPROTO_TCP)
		if m.Protocol == "udp" {
			protocol = unix.IPPROTO_UDP
		}
		v4, v6, all := m.families()
		for _, a := range r.Addresses {
			version := familyOf(a.Addr())
			if version == ipv4 && !v4 || version == ipv6 && !v6 {
				continue
			}
			host := version.all.Addr()
			if !all {
				host = netip.MustParseAddr(m.HostIP).Unmap()
			}
			out = append(out, forward{protocol: protocol, host: netip.AddrPortFrom(host, uint16(m.HostPort)),
				to: netip.AddrPortFrom(a.Addr(), uint16(m.ContainerPort))})
		}
	}
	return out
}

// publisher publishes ports of the host by the API of rootlesskit's parent.
type publisher struct {
	socket string
	http   *http.Client
	api    client.Client
}

func newPublisher(socket string) *publisher {
	p := &publisher{socket: socket}
	p.http = &http.Client{Transport: &http.Transport{DialContext: p.dial, MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second}}
	p.api = client.NewWithHTTPClient(p.http)
	return p
}

func (p *publisher) close() { p.http.CloseIdleConnections() }

// apiWait is how long a call waits for rootlesskit's API: the parent opens it only after the child has been
// told to start its command, which is us.
const apiWait = 3 * time.Second

func (p *publisher) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	deadline := time.Now().Add(apiWait)
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.socket)
		notYet := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
		if err == nil || !notYet || time.Now().After(deadline) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// publishWait bounds a request to publish one port.
const publishWait = 10 * time.Second

// publish brings its request to an end though the caller goes away: a request that is cut off may be served after
// the undo has asked which ports there are, and the port would stay taken.
func (p *publisher) publish(ctx context.Context, pod netip.Addr, m PortMapping) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("publish host port %s: %w", m, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishWait)
	defer cancel()
	if _, err := p.api.PortManager().AddPort(ctx, m.spec(pod)); err != nil {
		return fmt.Errorf("publish host port %s: %w", m, explainPublish(err, m))
	}
	return nil
}

// explainPublish finds the cause in the text that rootlesskit's API gives, which has no codes.
func explainPublish(err error, m PortMapping) error {
	text := err.Error()
	switch {
	case strings.Contains(text, "address already in use"), strings.Contains(text, "conflict with ID"):
		return fmt.Errorf("another program of the host has it: %w", ErrPortInUse)
	case strings.Contains(text, "permission denied"), strings.Contains(text, "privileged port"):
		return fmt.Errorf("%w; run: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d", ErrPortReserved, m.HostPort)
	case strings.Contains(text, "cannot assign requested address"):
		return fmt.Errorf("the host has no address %s: %w", m.HostIP, ErrInvalid)
	}
	return err
}

// unpublish ends every port that leads to the pod's addresses, which are this pod's alone. It is idempotent, and
// asks rootlesskit what there is: ids begin again with each parent, so that those of an older one would hit others.
func (p *publisher) unpublish(ctx context.Context, r *record) error {
	return p.unpublishIf(ctx, r.has)
}

func (p *publisher) unpublishIf(ctx context.Context, match func(childIP netip.Addr) bool) error {
	var errs []error
	err := p.each(ctx, func(st port.Status, childIP netip.Addr) {
		if !match(childIP) {
			return
		}
		if err := p.api.PortManager().RemovePort(ctx, st.ID); err != nil && !strings.Contains(err.Error(), "unknown id") {
			errs = append(errs, fmt.Errorf("unpublish host port %d/%s: %w", st.Spec.ParentPort, st.Spec.Proto, err))
		}
	})
	return errors.Join(err, errors.Join(errs...))
}

// each calls fn with every published port that leads to an address.
func (p *publisher) each(ctx context.Context, fn func(st port.Status, childIP netip.Addr)) error {
	list, err := p.api.PortManager().ListPorts(ctx)
	if err != nil {
		return fmt.Errorf("list published ports: %w", err)
	}
	for _, st := range list {
		if childIP, err := netip.ParseAddr(st.Spec.ChildIP); err == nil {
			fn(st, childIP)
		}
	}
	return nil
}

// ready asks the parent whether it is there.
func (p *publisher) ready(ctx context.Context) error {
	if _, err := p.api.Info(ctx); err != nil {
		return fmt.Errorf("ask the port driver: %w", err)
	}
	return nil
}
