package streaming

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a client's connection. A hijacked connection does not end its request's context: this one does.
type conn struct {
	net.Conn
	server *Server
	alive  context.Context // ends with the connection; its cause says why
	lose   context.CancelCauseFunc

	closing sync.Once
	ending  chan struct{} // closed by Close: nothing is read or written from then on
	killing sync.Once
	killed  chan struct{} // closed by kill
}

func newConn(raw net.Conn, server *Server) *conn {
	c := &conn{Conn: raw, server: server, ending: make(chan struct{}), killed: make(chan struct{})}
	c.alive, c.lose = context.WithCancelCause(server.ctx)
	return c
}

// bind makes the requests of the connection end with it.
func (c *conn) bind(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, connKey{}, c))
	context.AfterFunc(c.alive, func() { cancel(context.Cause(c.alive)) })
	return ctx
}

type connKey struct{}

// connOf returns the connection of a request.
func connOf(ctx context.Context) *conn { return ctx.Value(connKey{}).(*conn) }

func (c *conn) Read(p []byte) (int, error) { return c.check(c.Conn.Read(p)) }

func (c *conn) Write(p []byte) (int, error) { return c.check(c.Conn.Write(p)) }

// check takes an error as the client's end, unless it is a deadline's, which is our own doing.
func (c *conn) check(n int, err error) (int, error) {
	if err == nil {
		return n, nil
	}
	select {
	case <-c.ending:
		return n, net.ErrClosed
	default:
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		c.lose(errClientGone)
	}
	return n, err
}

// Close ends the connection so that the client gets everything that was sent: a socket that is closed while input
// waits to be read resets the connection, and the kernel throws away what it had not delivered. So the end is sent
// first, and the socket is closed once the client's kernel has it. Only the first call counts: spdystream waits a
// second for somebody to hear about an error of the second.
func (c *conn) Close() error {
	c.closing.Do(func() {
		close(c.ending)
		c.lose(net.ErrClosed)
		past := time.Unix(1, 0)
		tcp, ok := c.Conn.(*net.TCPConn)
		if !ok || tcp.SetReadDeadline(past) != nil || tcp.CloseWrite() != nil || c.delivered() || c.server.spawn(c.linger) != nil {
			c.kill()
		}
	})
	return nil
}

// linger waits for the client's kernel to acknowledge our end, which comes after all that was sent. A client that
// does not read holds its connection up, and nothing else.
func (c *conn) linger() {
	defer c.kill()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for pause := time.Millisecond; !c.delivered(); pause = min(2*pause, time.Second) {
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-c.killed:
			return
		}
	}
}

// kill closes the socket at once.
func (c *conn) kill() {
	c.killing.Do(func() {
		close(c.killed)
		c.lose(net.ErrClosed)
		c.server.forget(c)
		_ = c.Conn.Close() // an error says that the peer was faster
	})
}

// delivered tells whether our end, once sent, has reached the client.
func (c *conn) delivered() bool {
	switch c.state() {
	case unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_CLOSING, unix.BPF_TCP_LAST_ACK:
		return false
	}
	return true
}

// watchEvery is how often a session looks for its client's end behind input that nobody takes.
const watchEvery = 2 * time.Second

// watch notices a client that has gone while its input is not read, because the process does not take it: the end
// is behind that input. Where the input is more than our kernel keeps, the client's kernel goes on trying to send the
// rest for some minutes, and only then the end is seen.
func (c *conn) watch(ctx context.Context) {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if state := c.state(); state == unix.BPF_TCP_CLOSE_WAIT || state == unix.BPF_TCP_CLOSE {
			c.lose(errClientGone)
			return
		}
	}
}

// state is the kernel's TCP state; closed where the socket is. What is no socket counts as established.
func (c *conn) state() uint8 {
	raw, ok := c.Conn.(syscall.Conn)
	if !ok {
		return unix.BPF_TCP_ESTABLISHED
	}
	var state uint8 = unix.BPF_TCP_CLOSE
	if rc, err := raw.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { // fails on a closed socket
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				state = info.State
			}
		})
	}
	return state
}

type listener struct {
	net.Listener
	server *Server
}

func (l listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := newConn(raw, l.server)
	if !l.server.remember(c) {
		c.lose(errShutdown)
		return nil, errors.Join(http.ErrServerClosed, raw.Close())
	}
	return c, nil
}
