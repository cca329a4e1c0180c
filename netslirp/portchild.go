package netslirp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/lowlevelmsgutil"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/builtin/msg"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/builtin/opaque"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/peercred"
)

// portChild is the inner half of rootlesskit's builtin port driver: the parent accepts on the host and asks here,
// over a unix socket, for a socket that is connected to the pod from inside the node's namespace.
//
// It stands in for rootlesskit's own, which keeps a client's source address by running iptables: the reaper that
// it shares a process with takes those programs' exit statuses away, and the address is then lost for good, at
// random. The rules are in the firewall here, and need no program.
type portChild struct {
	log io.Writer
}

const (
	// connectTimeout bounds a connect to a pod, which only a pod that drops packets makes long.
	connectTimeout = 10 * time.Second
	// transparentTimeout bounds the try with the client's address, before the one without.
	transparentTimeout = time.Second
	// requestTimeout bounds the wait for a request of the parent, which sends it as soon as it is connected.
	requestTimeout = 10 * time.Second
)

// RunChildDriver serves until quit says so. netNSPath is the node's namespace.
func (d portChild) RunChildDriver(config map[string]string, quit <-chan struct{}, netNSPath string) error {
	node, err := openNetNS(netNSPath)
	if err != nil {
		return fmt.Errorf("run port driver: %w", err)
	}
	defer node.Close()
	ready, err := os.OpenFile(config[opaque.ChildReadyPipePath], os.O_WRONLY, 0) // blocks until the parent reads
	if err != nil {
		return fmt.Errorf("run port driver: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: config[opaque.SocketPath], Net: "unix"})
	if err == nil {
		err = os.Chmod(config[opaque.SocketPath], 0o600)
	}
	if err := errors.Join(err, ready.Close()); err != nil { // the parent waits for the end of the pipe
		return fmt.Errorf("run port driver: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // ends with quit, and cuts off what is under way
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		select {
		case <-quit:
			cancel()
		case <-ctx.Done():
		}
		listener.Close()
	})
	for {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept for port driver: %w", err)
		}
		wg.Go(func() {
			defer conn.Close()
			if err := ofThisUser(conn); err != nil {
				fmt.Fprintf(d.log, "port driver: connection refused: %v\n", err)
				return
			}
			if err := d.serve(ctx, conn, node); err != nil {
				// The parent reads no text but the missing descriptor, and closes the client's connection.
				_, _ = lowlevelmsgutil.MarshalToWriter(conn, &msg.Reply{Error: err.Error()})
				fmt.Fprintf(d.log, "port driver: %v\n", err)
			}
		})
	}
}

// ofThisUser refuses everybody but the user who started the node, whom this user namespace knows as its own id.
func ofThisUser(conn *net.UnixConn) error {
	uid, err := peercred.UID(conn)
	if err == nil && uid != uint32(os.Geteuid()) {
		err = fmt.Errorf("the socket is for the user who started the node, and not for uid %d", uid)
	}
	return err
}

// serve answers one request (rootlesskit's pkg/port/builtin/msg).
func (d portChild) serve(ctx context.Context, conn *net.UnixConn, node *os.File) error {
	var req msg.Request
	if err := conn.SetReadDeadline(time.Now().Add(requestTimeout)); err != nil {
		return err
	}
	if _, err := lowlevelmsgutil.UnmarshalFromReader(conn, &req); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	switch req.Type {
	case msg.RequestTypeInit:
		_, err := lowlevelmsgutil.MarshalToWriter(conn, nil)
		return err
	case msg.RequestTypeConnect:
		target, err := connect(ctx, node, req)
		if err != nil {
			return err
		}
		defer target.Close()
		return sendDescriptor(conn, target)
	}
	return fmt.Errorf("request type %q: %w", req.Type, ErrInvalid)
}

func connect(ctx context.Context, node *os.File, req msg.Request) (net.Conn, error) {
	if req.IP == "" { // a port for the node itself
		req.IP = "127.0.0.1"
	}
	target, err := netip.ParseAddr(req.IP)
	if err != nil {
		return nil, fmt.Errorf("connect to %q: %w: %w", req.IP, ErrInvalid, err)
	}
	network := strings.TrimRight(req.Proto, "46") // tcp4 says how the host listens
	addr := net.JoinHostPort(target.String(), strconv.Itoa(req.Port))
	var conn net.Conn
	err = inNetNS(node, func() (err error) {
		if source, ok := transparentSource(req, network, target); ok {
			dialer := net.Dialer{Timeout: transparentTimeout, Control: setTransparent, LocalAddr: net.TCPAddrFromAddrPort(source)}
			conn, err = dialer.DialContext(ctx, network, addr)
			if err == nil || errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		conn, err = (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to a pod: %w", err)
	}
	return conn, nil
}

// transparentSource is the client's address, where the target can be shown it, as the calling thread's namespace has it.
// A datagram server has no connection by which its answers could be told from its other packets, so UDP clients are
// not shown. Nor is a server of the node itself, or what the node passes on to a service: answers to them leave by the
// user-mode network, for nobody there, and the connect would only end with its time.
func transparentSource(req msg.Request, network string, target netip.Addr) (netip.AddrPort, bool) {
	source, err := netip.ParseAddr(req.SourceIP)
	source = source.Unmap()
	ok := err == nil && network == "tcp" && req.SourcePort != 0 && !source.IsLoopback() && familyOf(source) == familyOf(target) && source != target
	if localIPv6.Contains(target) && !localIPv6.Contains(source) {
		ok = false // the pod could not answer it (routePod)
	}
	ok = ok && !ofNode(target)
	return netip.AddrPortFrom(source, uint16(req.SourcePort)), ok
}

// ofNode tells whether the address is one of the namespace's own: packets for it go no further.
func ofNode(addr netip.Addr) bool {
	routes, err := netlink.RouteGet(addr.AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}

// setTransparent lets a socket bind an address that is not the node's (ip(7): IP_TRANSPARENT). The firewall sends
// the answers, which have that foreign address as their destination, to the socket.
func setTransparent(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if network == "tcp6" {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), level, option, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}); cerr != nil {
		return cerr
	}
	return err
}

func sendDescriptor(conn *net.UnixConn, target net.Conn) error {
	raw, err := target.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) {
		_, _, sendErr = conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	return sendErr
}
