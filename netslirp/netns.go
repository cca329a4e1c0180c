package netslirp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// openNetNS opens the network namespace that is bound on path.
func openNetNS(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	// A path whose bind mount is gone is an ordinary file: setns(2) would answer a bare EINVAL.
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s is not a network namespace: %w", path, ErrInvalid)
	}
	return f, nil
}

// inNetNS calls fn on an OS thread that is inside ns, and waits for it. fn must make its sockets itself and not in
// other goroutines, which run on other threads.
func inNetNS(ns *os.File, fn func() error) error {
	return OnOwnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
		}
		return fn()
	})
}

// OnOwnThread calls fn on a locked OS thread, waits for it, and lets the runtime end the thread: it is not unlocked,
// because it could not go back to the namespace that it came from (see doc.go).
//
// The process's first thread is spared. The runtime cannot end that one and parks it for good where it is, which
// would keep the namespace alive and be what /proc/self/ns/net and /proc/net show of the process.
//
// A panic of fn's goes on in the caller, who is the one that knows what it ends: in a goroutine of its own nobody would
// recover it, and it would end the process.
func OnOwnThread(fn func() error) error {
	type end struct {
		err   error
		panic *threadPanic
	}
	ended := make(chan end, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			first := fn
			fn = func() error { return OnOwnThread(first) } // this goroutine holds the first thread: the next one gets another
		}
		var e end
		defer func() {
			if reason := recover(); reason != nil {
				e.panic = carried(reason)
			}
			ended <- e
		}()
		e.err = fn()
	}()
	e := <-ended
	if e.panic != nil {
		panic(e.panic)
	}
	return e.err
}

// threadPanic is a panic on its way from the thread that had it. As a line for a client it is its reason alone; in a log
// (%+v), and where it ends the process, it has the stack of that thread, which the caller's does not show.
type threadPanic struct {
	reason any
	stack  []byte
}

func carried(reason any) *threadPanic {
	if p, ok := reason.(*threadPanic); ok {
		return p // by way of a second thread
	}
	return &threadPanic{reason, debug.Stack()}
}

func (p *threadPanic) Error() string {
	return fmt.Sprintf("%v, on a thread of its own:\n%s", p.reason, p.stack)
}

// Format implements fmt.Formatter.
func (p *threadPanic) Format(out fmt.State, _ rune) {
	if out.Flag('+') {
		fmt.Fprint(out, p.Error())
		return
	}
	fmt.Fprint(out, p.reason)
}

// DialPod connects by TCP to addr ("127.0.0.1:80", "[::1]:80", "localhost:80") as a process inside the network
// namespace at netNSPath would. "localhost" tries 127.0.0.1, then ::1. It blocks until connected or ctx ends.
func (n *Network) DialPod(ctx context.Context, netNSPath, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w: %w", addr, ErrInvalid, err)
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	} else if _, err := netip.ParseAddr(host); err != nil {
		return nil, fmt.Errorf("dial %s: %w: names are not resolved in a pod: %w", addr, ErrInvalid, err)
	}
	ns, err := openNetNS(netNSPath)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	defer ns.Close()
	var errs []error
	for _, h := range hosts {
		conn, err := dialIn(ctx, ns, net.JoinHostPort(h, port))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("dial %s in %s: %w", addr, netNSPath, errors.Join(errs...))
}

// dialIn connects to one literal address. For those net.Dialer makes its socket on the calling thread; for a name
// with several addresses it would race goroutines, whose threads are elsewhere.
func dialIn(ctx context.Context, ns *os.File, addr string) (net.Conn, error) {
	var conn net.Conn
	err := inNetNS(ns, func() (err error) {
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, "tcp", addr)
		return err
	})
	return conn, err
}

// ListenNode listens by TCP on addr, a literal address, inside the node's network namespace.
func (n *Network) ListenNode(addr string) (net.Listener, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("listen on %s in the node: %w: %w", addr, ErrInvalid, err)
	}
	var listener net.Listener
	err := inNetNS(n.node.ns, func() (err error) {
		listener, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in the node: %w", err)
	}
	return listener, nil
}
