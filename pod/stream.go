package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/coracle-cri/coracle/ctr"
)

func (s *Service) execURL(req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("exec in container %s: the command is empty", c.spec.ID)
	}
	if err := c.requireRunning("exec in"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.ContainerId = c.spec.ID
	return s.streams.GetExec(full)
}

func (s *Service) attachURL(req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.requireRunning("attach to"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.ContainerId = c.spec.ID
	return s.streams.GetAttach(full)
}

func (s *Service) portForwardURL(req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := requireReady(p, "forward ports of"); err != nil {
		return nil, err
	}
	full := proto.CloneOf(req)
	full.PodSandboxId = p.spec.ID
	return s.streams.GetPortForward(full)
}

// streamRuntime is what the streaming server calls once a client has come with its token.
type streamRuntime struct {
	service *Service
	server  *streamServer
}

// exitError carries an exit code: the shape that cri-streaming looks for (utilexec.ExitError).
type exitError int

func (e exitError) Error() string   { return "command terminated with exit code " + strconv.Itoa(int(e)) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }

// join begins a session with a running container; end is to be called in the end.
func (r *streamRuntime) join(ctx context.Context, id, verb string) (_ context.Context, end func(), _ *container, err error) {
	ctx, end, err = r.server.session(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	c, err := r.service.index.container(id)
	if err == nil {
		err = c.requireRunning(verb)
	}
	if err != nil {
		end()
		return nil, nil, nil, err
	}
	return ctx, end, c, nil
}

// Exec runs a command with the client's streams. A client that goes takes the command with it.
//
//nolint:revive // the parameters are cri-streaming's
func (r *streamRuntime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errOut io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, end, c, err := r.join(ctx, id, "exec in")
	if err != nil {
		return err
	}
	defer end()
	stdio := &stdio{server: r.server, in: in, out: out, errOut: errOut}
	defer stdio.close()
	req := ctr.ExecRequest{ContainerID: c.spec.ID, Process: ctr.ExecProcess(c.oci(), cmd, tty), TTY: tty}
	if !tty {
		if req.Streams, err = stdio.pipes(); err != nil {
			return err
		}
	}
	session, err := r.service.deps.Containers.Exec(ctx, req)
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", id, err)
	}
	defer session.Close() // kills what an early return leaves; otherwise closed below
	if tty {
		if err := stdio.terminal(session.Console()); err != nil {
			return err
		}
		set := func(size remotecommand.TerminalSize) { setSize(stdio.console, size) }
		if err := r.server.spawn(func() { resizeLoop(ctx, resize, set) }); err != nil {
			return err
		}
	}
	if err := stdio.start(); err != nil {
		return err
	}
	code, err := session.Wait(ctx)
	err = errors.Join(err, session.Close())
	stdio.finish()
	if err == nil && code != 0 {
		return exitError(code)
	}
	return err
}

// Attach joins the streams of the container's first process until it ends or the client goes.
//
//nolint:revive // the parameters are cri-streaming's
func (r *streamRuntime) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser,
	_ bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, end, c, err := r.join(ctx, id, "attach to")
	if err != nil {
		return err
	}
	defer end()
	stdio := &stdio{server: r.server, in: in, out: out, errOut: errOut}
	defer stdio.close()
	streams, err := stdio.pipes()
	if err != nil {
		return err
	}
	if c.spec.Config.GetTty() && resize != nil {
		set := func(size remotecommand.TerminalSize) {
			// A size that is not set is no reason to end the session; the next one will be.
			_ = r.service.deps.Containers.Resize(ctx, c.spec.ID, size.Width, size.Height)
		}
		if err := r.server.spawn(func() { resizeLoop(ctx, resize, set) }); err != nil {
			closeFiles(streams.Stdin, streams.Stdout, streams.Stderr)
			return err
		}
	}
	if err := stdio.start(); err != nil {
		closeFiles(streams.Stdin, streams.Stdout, streams.Stderr)
		return err
	}
	err = r.service.deps.Containers.Attach(ctx, c.spec.ID, streams)
	stdio.finish()
	return err
}

// PortForward carries one connection to a port on the pod's loopback.
func (r *streamRuntime) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	ctx, end, err := r.server.session(ctx)
	if err != nil {
		return err
	}
	defer end()
	p, err := r.service.index.pod(id)
	if err != nil {
		return err
	}
	if err := requireReady(p, "forward ports of"); err != nil {
		return err
	}
	conn, err := r.dial(ctx, p, port)
	if err != nil {
		return fmt.Errorf("forward port %d of pod %s: %w", port, id, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	return r.relay(conn, stream)
}

const (
	dialTimeout = 10 * time.Second
	// halfClosedIdle ends a connection whose client has stopped sending, and to which the pod sends nothing:
	// the client may have gone altogether, which the protocol does not tell.
	halfClosedIdle = time.Minute
)

// dial tries both loopbacks: programs listen on one of them, and port-forward names none.
func (r *streamRuntime) dial(ctx context.Context, p *pod, port int32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	netNS := r.service.netNS(p)
	var errs []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := r.service.deps.Network.DialPod(ctx, netNS, net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// relay ends when the pod's side does. The client's end of sending is passed on as such.
func (r *streamRuntime) relay(conn net.Conn, stream io.ReadWriteCloser) error {
	err := r.server.spawn(func() {
		_, _ = io.Copy(conn, stream) // either side may break off: the other direction reports it
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		_ = conn.SetReadDeadline(time.Now().Add(halfClosedIdle))
	})
	if err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, err := stream.Write(buf[:n]); err != nil {
				return nil // the client is gone
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || isTimeout(err) {
				return nil
			}
			return fmt.Errorf("read from the pod: %w", err)
		}
	}
}

func resizeLoop(ctx context.Context, sizes <-chan remotecommand.TerminalSize, set func(remotecommand.TerminalSize)) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if size.Width > 0 && size.Height > 0 {
				set(size)
			}
		case <-ctx.Done():
			return
		}
	}
}

func setSize(console *os.File, size remotecommand.TerminalSize) {
	raw, err := console.SyscallConn()
	if err != nil {
		return // closed: the session is over
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
}
