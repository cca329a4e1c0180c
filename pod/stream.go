package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/pod/streaming"
)

func (s *Service) execURL(req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("exec in container %s: the command is empty", c.spec.ID)
	}
	if err := validateStreams("exec in", c.spec.ID, req); err != nil {
		return nil, err
	}
	if err := c.requireRunning("exec in"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.ContainerId = c.spec.ID
	url, err := s.streams.ExecURL(full)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.spec.ID, err)
	}
	return &runtimeapi.ExecResponse{Url: url}, nil
}

// attachURL does not compare req.Tty with the container's, as the CRI says it "must match": other runtimes take
// either, and what the container has is what counts.
func (s *Service) attachURL(req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := validateStreams("attach to", c.spec.ID, req); err != nil {
		return nil, err
	}
	if err := c.requireRunning("attach to"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.ContainerId = c.spec.ID
	url, err := s.streams.AttachURL(full)
	if err != nil {
		return nil, fmt.Errorf("attach to container %s: %w", c.spec.ID, err)
	}
	return &runtimeapi.AttachResponse{Url: url}, nil
}

// validateStreams holds exec and attach to what the CRI says of their streams.
func validateStreams(verb, id string, req interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
}) error {
	if !req.GetStdin() && !req.GetStdout() && !req.GetStderr() {
		return invalid("%s container %s: one of stdin, stdout and stderr must be true", verb, id)
	}
	if req.GetTty() && req.GetStderr() {
		return invalid("%s container %s: tty and stderr are both true, but a terminal has one output: stdout", verb, id)
	}
	return nil
}

func (s *Service) portForwardURL(req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	for _, port := range req.GetPort() {
		if port < 1 || port > 65535 {
			return nil, invalid("forward ports of pod %s: %d is not a port: 1 to 65535 are", p.spec.ID, port)
		}
	}
	if err := requireReady(p, "forward ports of"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.PodSandboxId = p.spec.ID
	url, err := s.streams.PortForwardURL(full)
	if err != nil {
		return nil, fmt.Errorf("forward ports of pod %s: %w", p.spec.ID, err)
	}
	return &runtimeapi.PortForwardResponse{Url: url}, nil
}

// streamRuntime is what the streaming server calls once a client has come.
type streamRuntime struct{ service *Service }

// running finds a container, which may have ended since the URL was given out.
func (r *streamRuntime) running(id, verb string) (*container, error) {
	c, err := r.service.index.container(id)
	if err != nil {
		return nil, err
	}
	return c, c.requireRunning(verb)
}

// Exec runs a command with the client's streams. A client that goes takes the command with it.
func (r *streamRuntime) Exec(ctx context.Context, req *runtimeapi.ExecRequest, client *streaming.Client) error {
	c, err := r.running(req.GetContainerId(), "exec in")
	if err != nil {
		return err
	}
	stdio := &stdio{client: client}
	defer stdio.close()
	process := ctr.ExecRequest{ContainerID: c.spec.ID, Process: ctr.ExecProcess(c.oci(), req.GetCmd(), req.GetTty()), TTY: req.GetTty()}
	if !req.GetTty() {
		if process.Streams, err = stdio.pipes(); err != nil {
			return err
		}
	}
	session, err := r.service.deps.Containers.Exec(ctx, process)
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", c.spec.ID, err)
	}
	defer session.Close() // kills what an early return leaves; otherwise closed below
	if req.GetTty() {
		if err := stdio.terminal(session.Console()); err != nil {
			return err
		}
		client.Go(func() {
			resizeLoop(ctx, client.Sizes, func(size streaming.Size) { setSize(stdio.console, size) })
		})
	}
	stdio.start()
	code, err := session.Wait(ctx)
	err = errors.Join(err, session.Close())
	stdio.finish()
	if err == nil && code != 0 {
		return streaming.ExitError(code)
	}
	return err
}

// Attach joins the streams of the container's first process until it ends or the client goes.
func (r *streamRuntime) Attach(ctx context.Context, req *runtimeapi.AttachRequest, client *streaming.Client) error {
	c, err := r.running(req.GetContainerId(), "attach to")
	if err != nil {
		return err
	}
	stdio := &stdio{client: client}
	defer stdio.close()
	streams, err := stdio.pipes()
	if err != nil {
		return err
	}
	if c.spec.Config.GetTty() {
		client.Go(func() {
			resizeLoop(ctx, client.Sizes, func(size streaming.Size) {
				// A size that is not set is no reason to end the session; the next one will be.
				_ = r.service.deps.Containers.Resize(ctx, c.spec.ID, size.Width, size.Height)
			})
		})
	}
	stdio.start()
	err = r.service.deps.Containers.Attach(ctx, c.spec.ID, streams)
	stdio.finish()
	return err
}

// PortForward carries one connection to a port on the pod's loopback.
func (r *streamRuntime) PortForward(ctx context.Context, podID string, port uint16, client *streaming.Client) error {
	p, err := r.service.index.pod(podID)
	if err != nil {
		return err
	}
	if err := requireReady(p, "forward ports of"); err != nil {
		return err
	}
	conn, err := r.dial(ctx, p, port)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return errors.Join(relay(conn, client), ctx.Err())
}

const (
	dialTimeout = 10 * time.Second
	// halfClosedIdle ends a connection whose client has stopped sending, and to which the pod sends nothing: the
	// client may have closed it altogether, which the protocol does not tell before the pod sends.
	halfClosedIdle = time.Hour
)

// dial tries both loopbacks: programs listen on one of them, and port-forward names none.
func (r *streamRuntime) dial(ctx context.Context, p *pod, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	netNS := r.service.netNS(p)
	var errs []error
	nobody := true
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := r.service.deps.Network.DialPod(ctx, netNS, net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
		nobody = nobody && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EADDRNOTAVAIL))
	}
	if nobody {
		return nil, fmt.Errorf("forward to port %d of pod %s: nothing listens there, on 127.0.0.1 or ::1", port, p.spec.ID)
	}
	return nil, fmt.Errorf("forward to port %d of pod %s: %w", port, p.spec.ID, errors.Join(errs...))
}

// relay ends when the pod's side does. The client's end of sending is passed on as such.
func relay(conn net.Conn, client *streaming.Client) error {
	var halfClosed atomic.Bool
	idle := func() { _ = conn.SetReadDeadline(time.Now().Add(halfClosedIdle)) }
	client.Go(func() {
		_, _ = io.Copy(conn, client.Stdin) // either side may break off: the other direction reports it
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		halfClosed.Store(true)
		idle()
	})
	buf := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, err := client.Stdout.Write(buf[:n]); err != nil {
				return nil // the client is gone
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return fmt.Errorf("read from the pod: %w", err)
		case halfClosed.Load():
			idle()
		}
	}
}

// resizeLoop passes sizes on; there are none where sizes is nil.
func resizeLoop(ctx context.Context, sizes <-chan streaming.Size, set func(streaming.Size)) {
	for {
		select {
		case size := <-sizes:
			set(size)
		case <-ctx.Done():
			return
		}
	}
}

func setSize(console *os.File, size streaming.Size) {
	raw, err := console.SyscallConn()
	if err != nil {
		return // closed: the session is over
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
}
