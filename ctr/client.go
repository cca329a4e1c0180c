package ctr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
	"github.com/coracle-cri/coracle/e2e/crash"
)

// Errors of the keeper; errors.Is finds them in what the client's methods return.
var (
	ErrNotFound   = wire.ErrNotFound
	ErrNotRunning = wire.ErrNotRunning
	ErrExists     = wire.ErrExists
	// ErrLogReplaced: something else is in the place of a log, or of a directory between it and its LogDir.
	ErrLogReplaced = wire.ErrLogReplaced
)

type (
	// State is a snapshot of a container, computed from the keeper's facts.
	State = wire.State
	// Event is an exit or an OOM kill.
	Event = wire.Event
	// Info describes the keeper.
	Info = wire.Info
	// Runtime names an OCI runtime program.
	Runtime = wire.Runtime
)

// The types of events.
const (
	EventExit = wire.EventExit
	EventOOM  = wire.EventOOM
)

// What a daemon tells the keeper once it has started.
const (
	ReadyEnv     = wire.ReadyEnv
	ReadyServing = wire.ReadyServing
)

// Client calls the keeper. It holds no connection and no state: each call dials for itself. All methods may run
// at once; each returns when its context ends, with the context's error.
type Client struct {
	socket string
}

// NewClient makes a client of the keeper that listens, or will listen, on socket.
func NewClient(socket string) *Client { return &Client{socket: socket} }

// CreateRequest describes a container.
type CreateRequest struct {
	ID   string
	Spec *specs.Spec
	// LogPath is absolute, in a directory that exists; "" keeps no log.
	LogPath string
	// LogDir is the directory in which the log may be: on the way from it to LogPath no symbolic link is followed. With ""
	// only a link in the last place is refused.
	LogDir string
	// Stdin keeps standard input open for attach; StdinOnce closes it after the first attach that had it.
	Stdin, StdinOnce bool
	TTY              bool
	// Runtime makes the container and runs what is executed in it; nil is libcontainer in the keeper.
	Runtime *Runtime
}

// Create makes a container whose init process waits for Start. On an error nothing of it is left. A program that
// cannot be executed is an error here, not of Start.
func (c *Client) Create(ctx context.Context, r CreateRequest) (State, error) {
	return c.callState(ctx, wire.Request{Op: wire.OpCreate, ID: r.ID, Create: &wire.Create{
		Spec: r.Spec, LogPath: r.LogPath, LogDir: r.LogDir, Stdin: r.Stdin, StdinOnce: r.StdinOnce, TTY: r.TTY, Runtime: r.Runtime}})
}

// Start lets a created container run.
func (c *Client) Start(ctx context.Context, id string) (State, error) {
	return c.callState(ctx, wire.Request{Op: wire.OpStart, ID: id})
}

// Kill sends sig to the container's init process, or to all its processes. A container that has exited already is
// no error; one that is unknown is ErrNotFound.
func (c *Client) Kill(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpKill, ID: id, Kill: &wire.Kill{Signal: sig, All: all}})
	return err
}

// Delete kills what lives of a container, waits for that, and forgets the container. It is idempotent.
func (c *Client) Delete(ctx context.Context, id string) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpDelete, ID: id})
	return err
}

// List returns all containers, in no order.
func (c *Client) List(ctx context.Context) ([]State, error) {
	reply, err := c.call(ctx, wire.Request{Op: wire.OpList})
	return reply.States, err
}

// ReopenLog makes the keeper go on in a new file at the log's path, after the old one was renamed. A container
// that does not run is ErrNotRunning, and no file is made. logDir is the LogDir of its CreateRequest, which the keeper
// does not remember.
func (c *Client) ReopenLog(ctx context.Context, id, logDir string) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpReopenLog, ID: id, LogDir: logDir})
	return err
}

// Resize sets the size, in characters, of a running container's terminal.
func (c *Client) Resize(ctx context.Context, id string, width, height uint16) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpResize, ID: id, Size: &wire.Size{Width: width, Height: height}})
	return err
}

// Update puts other limits on a container's cgroup, all or none of them. Fields that are nil stay as they are.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpUpdate, ID: id, Resources: r})
	return err
}

// Info describes the keeper. Another BootID than before means another node, in which nothing of the old one runs.
func (c *Client) Info(ctx context.Context) (Info, error) {
	reply, err := c.call(ctx, wire.Request{Op: wire.OpInfo})
	if err != nil {
		return Info{}, err
	}
	if reply.Info == nil {
		return Info{}, errNoAnswer
	}
	return *reply.Info, nil
}

// Shutdown asks the keeper to end the node: it kills every container and stops the daemon. It returns when the
// keeper has agreed, not when that is done.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpShutdown})
	return err
}

// RestartDaemon ends the daemon and starts program, an absolute path, in its place. It returns when that serves. On an
// error the daemon of before goes on, or has been started again.
func (c *Client) RestartDaemon(ctx context.Context, program string) error {
	_, err := c.call(ctx, wire.Request{Op: wire.OpRestart, Program: program})
	return err
}

// ReplaceKeeper makes the keeper execute program, an absolute path, in its own place; containers, execs and the daemon go
// on, attachments end with an error. The answer is the new keeper's. On an error the keeper of before goes on.
func (c *Client) ReplaceKeeper(ctx context.Context, program string) (Info, error) {
	reply, err := c.call(ctx, wire.Request{Op: wire.OpReplace, Program: program})
	if err != nil {
		return Info{}, err
	}
	if reply.Info == nil {
		return Info{}, errNoAnswer
	}
	return *reply.Info, nil
}

// Events calls fn with every event after the sequence since, first those that have been, then those that come. It
// returns when ctx ends, when the keeper is lost, or with fn's error.
func (c *Client) Events(ctx context.Context, since uint64, fn func(Event) error) error {
	s, _, err := c.open(ctx, wire.Request{Op: wire.OpEvents, Since: since})
	if err != nil {
		return err
	}
	defer s.close()
	for {
		reply, err := s.read()
		if err != nil {
			return err
		}
		if reply.Event == nil {
			return errNoAnswer
		}
		if err := fn(*reply.Event); err != nil {
			return err
		}
	}
}

// errNoAnswer is a keeper that speaks another version of the protocol.
var errNoAnswer = errors.New("the keeper's reply has no answer")

func (c *Client) callState(ctx context.Context, req wire.Request) (State, error) {
	reply, err := c.call(ctx, req)
	if err != nil {
		return State{}, err
	}
	if reply.State == nil {
		return State{}, errNoAnswer
	}
	return *reply.State, nil
}

// call makes a call of one reply.
func (c *Client) call(ctx context.Context, req wire.Request) (wire.Reply, error) {
	s, reply, err := c.open(ctx, req)
	if err != nil {
		return wire.Reply{}, err
	}
	s.close()
	return reply, nil
}

// stream is an open call. Its context closes the connection, which gives the call up.
type stream struct {
	ctx   context.Context
	conn  *wire.Conn
	files []*os.File // that came with the last reply
	stop  func() bool
}

// open dials, sends the request with files, and reads the first reply. It closes files in any case.
func (c *Client) open(ctx context.Context, req wire.Request, files ...*os.File) (*stream, wire.Reply, error) {
	defer wire.CloseFiles(files)
	crash.Point("ctr/call-begun")
	var d net.Dialer
	u, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, wire.Reply{}, fmt.Errorf("call keeper: %w", err)
	}
	s := &stream{ctx: ctx, conn: wire.NewConn(u.(*net.UnixConn))}
	s.stop = context.AfterFunc(ctx, func() { _ = s.conn.Close() })
	err = s.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err == nil {
		err = s.conn.Write(req, files...)
	}
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		// EPIPE: the keeper may have refused already, and then its reply says why.
		s.close()
		return nil, wire.Reply{}, s.explain(err)
	}
	crash.Point("ctr/call-sent")
	wire.CloseFiles(files) // the keeper has duplicates; who reads the other ends must see them closed by it alone
	reply, err := s.read()
	crash.Point("ctr/call-answered")
	if err != nil {
		s.close()
		return nil, wire.Reply{}, err
	}
	return s, reply, nil
}

// sendTimeout bounds the sending of a request; the keeper reads at once.
const sendTimeout = 10 * time.Second

func (s *stream) read() (wire.Reply, error) {
	var reply wire.Reply
	files, err := s.conn.Read(&reply)
	if err != nil {
		return wire.Reply{}, s.explain(err)
	}
	if reply.Error != nil {
		wire.CloseFiles(files)
		return wire.Reply{}, reply.Error
	}
	wire.CloseFiles(s.files)
	s.files = files
	return reply, nil
}

// explain prefers the context's end to what it has done to the connection.
func (s *stream) explain(err error) error {
	if ctxErr := s.ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	if errors.Is(err, io.EOF) {
		return errors.New("call keeper: it closed the connection without an answer")
	}
	return fmt.Errorf("call keeper: %w", err)
}

func (s *stream) close() {
	s.stop()
	_ = s.conn.Close() // nothing is on its way: a call ends by its reply or is given up
	wire.CloseFiles(s.files)
	s.files = nil
}
