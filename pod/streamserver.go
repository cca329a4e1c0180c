package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"syscall"
	"time"

	"k8s.io/cri-streaming/pkg/streaming"
)

// portAttempts bounds the search for a port that is free in both network namespaces.
const portAttempts = 20

// streamServer serves exec, attach and port-forward. It listens on one port twice: on the loopback of the host,
// for crictl outside, and on that of the node's network namespace, for a kubelet inside. A token that is good
// for one use, and is part of the URL, lets in.
type streamServer struct {
	streaming.Server // the URLs, and the protocol

	addr   string
	http   *http.Server
	ctx    context.Context // ends with close
	cancel context.CancelFunc

	mu     sync.Mutex // guards conns, closed and additions to wg
	closed bool
	conns  map[*streamConn]struct{}
	wg     sync.WaitGroup // servers, sessions and their copies
}

var errStreamsClosed = errors.New("the daemon is shutting down")

func openStreams(s *Service, addr string) (*streamServer, error) {
	host, node, err := listenBoth(s.deps.Network, addr)
	if err != nil {
		return nil, fmt.Errorf("open streaming server: %w", err)
	}
	x := &streamServer{addr: host.Addr().String(), conns: map[*streamConn]struct{}{}}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	config := streaming.DefaultConfig
	config.BaseURL = &url.URL{Scheme: "http", Host: x.addr}
	if x.Server, err = streaming.NewServer(config, &streamRuntime{s, x}); err != nil {
		x.cancel()
		return nil, errors.Join(fmt.Errorf("open streaming server: %w", err), host.Close(), node.Close())
	}
	x.http = &http.Server{
		Handler:           x.Server,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return x.ctx },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if c, ok := conn.(*streamConn); ok {
				return c.bind(ctx)
			}
			return ctx
		},
	}
	for _, l := range []net.Listener{host, node} {
		x.wg.Go(func() {
			if err := x.http.Serve(streamListener{l, x}); !errors.Is(err, http.ErrServerClosed) {
				s.cfg.Log.Error("streaming server ended", "address", l.Addr(), "error", err)
			}
		})
	}
	return x, nil
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

// close ends every session and waits for all goroutines.
func (x *streamServer) close() error {
	x.cancel()
	x.mu.Lock()
	x.closed = true
	conns := make([]*streamConn, 0, len(x.conns))
	for c := range x.conns {
		conns = append(conns, c)
	}
	x.mu.Unlock()
	err := x.http.Close()
	for _, c := range conns {
		c.Close() // hijacked ones are unknown to the HTTP server; an error says that the peer was faster
	}
	x.wg.Wait()
	return err
}

// spawn runs fn as a goroutine that close waits for.
func (x *streamServer) spawn(fn func()) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return errStreamsClosed
	}
	x.wg.Go(fn)
	return nil
}

// session counts a running session. Its context ends with the client's connection, and with the server.
func (x *streamServer) session(ctx context.Context) (context.Context, func(), error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil, nil, errStreamsClosed
	}
	x.wg.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	release := context.AfterFunc(x.ctx, cancel) // port-forward comes with a background context
	return ctx, func() { release(); cancel(); x.wg.Done() }, nil
}

type streamListener struct {
	net.Listener
	server *streamServer
}

func (l streamListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &streamConn{Conn: conn, server: l.server}
	c.alive, c.lost = context.WithCancel(l.server.ctx)
	l.server.mu.Lock()
	defer l.server.mu.Unlock()
	if l.server.closed {
		c.lost()
		return nil, errors.Join(http.ErrServerClosed, conn.Close())
	}
	l.server.conns[c] = struct{}{}
	return c, nil
}

// streamConn tells sessions when their client is gone: a hijacked connection does not end a request's context.
type streamConn struct {
	net.Conn
	server *streamServer
	alive  context.Context // ends with the connection
	lost   context.CancelFunc
	once   sync.Once
	err    error // of the first Close
}

// bind makes the requests of the connection end with it.
func (c *streamConn) bind(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(c.alive, cancel)
	return ctx
}

func (c *streamConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && !errors.Is(err, syscall.EAGAIN) && !isTimeout(err) {
		c.lost()
	}
	return n, err
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// Close may come from the protocol and from the server's end. Only the first counts: spdystream waits a second
// for somebody to hear about an error of the second.
func (c *streamConn) Close() error {
	c.once.Do(func() {
		c.lost()
		c.server.mu.Lock()
		delete(c.server.conns, c)
		c.server.mu.Unlock()
		c.err = c.Conn.Close()
	})
	return c.err
}
