package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// messageTimeout bounds the transfer of one message. A caller that is slower is given up.
const messageTimeout = 10 * time.Second

// call is one connection's request on its way through the keeper.
type call struct {
	keeper *Keeper
	conn   *wire.Conn
	req    wire.Request
	files  []*os.File
}

// handlers maps each call to what serves it; the reply is the last one of the call.
var handlers = map[wire.Op]func(*call, context.Context) (wire.Reply, error){
	wire.OpInfo:      (*call).info,
	wire.OpCreate:    (*call).create,
	wire.OpStart:     (*call).start,
	wire.OpKill:      (*call).kill,
	wire.OpDelete:    (*call).delete,
	wire.OpExec:      (*call).exec,
	wire.OpAttach:    (*call).attach,
	wire.OpResize:    (*call).resize,
	wire.OpReopenLog: (*call).reopenLog,
	wire.OpUpdate:    (*call).update,
	wire.OpRestart:   (*call).restart,
	wire.OpReplace:   (*call).replace,
	wire.OpList:      (*call).list,
	wire.OpEvents:    (*call).events,
	wire.OpShutdown:  (*call).shutdown,
}

// serve accepts calls until the listener is closed.
func (k *Keeper) serve() {
	for {
		u, err := k.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			k.swap.rest()
			continue
		}
		if err != nil {
			k.log.Error("accept call", "error", err)
			time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		k.begin(&call{keeper: k, conn: wire.NewConn(u)}, (*call).serve)
	}
}

// begin serves a call beside the caller.
func (k *Keeper) begin(c *call, serve func(*call) (wire.Reply, error)) {
	k.mu.Lock()
	k.conns[c.conn] = struct{}{}
	k.mu.Unlock()
	k.swap.calls.enter()
	k.tasks.Go(func() {
		defer k.swap.calls.leave()
		k.handle(c, serve)
	})
}

// handle serves one call. Whatever goes wrong in it is answered, and stays in it.
func (k *Keeper) handle(c *call, serve func(*call) (wire.Reply, error)) {
	conn := c.conn
	defer func() {
		_ = conn.Close() // the peer has got its reply or is gone
		wire.CloseFiles(c.files)
		k.mu.Lock()
		delete(k.conns, conn)
		k.mu.Unlock()
	}()
	reply, err := serve(c)
	if errors.Is(err, errGone) {
		return
	}
	reply.Error = wire.ToError(err)
	if err := c.reply(reply); err != nil {
		k.log.Debug("caller is gone before the reply", "op", c.req.Op, "container", c.req.ID, "error", err)
	}
}

// errGone ends a call whose caller is not there to be answered.
var errGone = errors.New("the caller is gone")

func (c *call) serve() (reply wire.Reply, err error) {
	defer func() {
		if p := recover(); p != nil {
			c.keeper.log.Error("panic in a call", "op", c.req.Op, "container", c.req.ID, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%s: the keeper made a mistake: %v", c.req.Op, p)
		}
	}()
	uid, err := c.conn.PeerUID()
	if err != nil {
		return reply, err
	}
	if uid != uint32(os.Geteuid()) {
		return reply, fmt.Errorf("uid %d may not use this keeper: %w", uid, wire.ErrBadRequest)
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(messageTimeout)); err != nil {
		return reply, errGone
	}
	if c.files, err = c.conn.Read(&c.req); err != nil {
		return reply, err
	}
	if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
		return reply, errGone
	}
	handler, ok := handlers[c.req.Op]
	if !ok {
		return reply, fmt.Errorf("unknown call %q: %w", c.req.Op, wire.ErrBadRequest)
	}
	reply, err = handler(c, c.keeper.callCtx)
	switch {
	case err == nil || errors.Is(err, errGone):
		return reply, err
	case c.req.ID != "":
		return wire.Reply{}, fmt.Errorf("%s %s: %w", c.req.Op, c.req.ID, err)
	default:
		return wire.Reply{}, fmt.Errorf("%s: %w", c.req.Op, err)
	}
}

func (c *call) reply(r wire.Reply, files ...*os.File) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(messageTimeout)); err != nil {
		return err
	}
	return c.conn.Write(r, files...)
}

// gone returns a channel that is closed when the caller closes, and at the latest when the call ends.
func (c *call) gone() <-chan struct{} {
	gone := make(chan struct{})
	c.keeper.tasks.Go(func() { defer close(gone); c.conn.AwaitClose() })
	return gone
}

// streams sorts the descriptors that came with the request.
func (c *call) streams() (s stdStreams, err error) {
	files := c.files
	for _, want := range []struct {
		asked bool
		file  **os.File
	}{{c.req.Streams.Stdin, &s.stdin}, {c.req.Streams.Stdout, &s.stdout}, {c.req.Streams.Stderr, &s.stderr}} {
		if !want.asked {
			continue
		}
		if len(files) == 0 {
			return s, fmt.Errorf("fewer descriptors than streams: %w", wire.ErrBadRequest)
		}
		*want.file, files = files[0], files[1:]
	}
	if len(files) > 0 {
		return s, fmt.Errorf("more descriptors than streams: %w", wire.ErrBadRequest)
	}
	return s, nil
}

func (c *call) container(ctx context.Context) (*container, error) {
	return c.keeper.lookup(ctx, c.req.ID)
}

func (c *call) info(context.Context) (wire.Reply, error) {
	k := c.keeper
	return wire.Reply{Info: &wire.Info{Version: k.cfg.Version, BootID: k.bootID, Pid: os.Getpid(), Seq: k.journal.last(),
		Goroutines: runtime.NumGoroutine()}}, nil
}

func (c *call) create(context.Context) (wire.Reply, error) {
	state, err := c.keeper.create(c.req.ID, c.req.Create)
	return wire.Reply{State: &state}, err
}

func (c *call) start(ctx context.Context) (wire.Reply, error) {
	ctr, err := c.container(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	state, err := ctr.start()
	return wire.Reply{State: &state}, err
}

func (c *call) kill(ctx context.Context) (wire.Reply, error) {
	if c.req.Kill == nil {
		return wire.Reply{}, fmt.Errorf("no signal: %w", wire.ErrBadRequest)
	}
	ctr, err := c.container(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	return wire.Reply{}, ctr.kill(*c.req.Kill)
}

func (c *call) delete(ctx context.Context) (wire.Reply, error) {
	return wire.Reply{}, c.keeper.remove(ctx, c.req.ID)
}

func (c *call) exec(ctx context.Context) (wire.Reply, error) {
	streams, err := c.streams()
	if err != nil {
		return wire.Reply{}, err
	}
	defer streams.close()
	if c.req.Exec == nil {
		return wire.Reply{}, fmt.Errorf("no process: %w", wire.ErrBadRequest)
	}
	ctr, err := c.container(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	s, tty, err := ctr.exec(c.req.Exec, streams)
	if err != nil {
		return wire.Reply{}, err
	}
	// From here on only the process and the caller hold the streams, so that each sees the other's end.
	streams.close()
	var files []*os.File
	if tty != nil {
		files = append(files, tty)
	}
	err = c.reply(wire.Reply{State: &wire.State{ID: c.req.ID, Pid: s.leader.pid, PidStart: s.leader.start}}, files...)
	wire.CloseFiles(files)
	if err != nil {
		return wire.Reply{}, errors.Join(errGone, s.kill())
	}
	return c.await(s)
}

// await waits for the end of an exec that runs. It is what goes on where the keeper is replaced.
func (c *call) await(s *session) (wire.Reply, error) {
	gone := c.gone()
	c.keeper.swap.park(c, s)
	select {
	case <-s.exited:
	case <-gone:
	}
	c.keeper.swap.unpark(c)
	if closedWithin(s.exited, 0) {
		return wire.Reply{ExitCode: &s.code}, nil
	}
	if err := s.kill(); err != nil {
		c.keeper.log.Error("end abandoned exec", "container", c.req.ID, "error", err)
		return wire.Reply{}, err
	}
	return wire.Reply{ExitCode: &s.code}, nil
}

func (c *call) attach(ctx context.Context) (wire.Reply, error) {
	streams, err := c.streams()
	if err != nil {
		return wire.Reply{}, err
	}
	ctr, err := c.container(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	a, err := ctr.attach(streams)
	if err != nil {
		return wire.Reply{}, err
	}
	defer a.close()
	if err := c.reply(wire.Reply{}); err != nil {
		return wire.Reply{}, errGone
	}
	return wire.Reply{}, a.wait(c.gone(), c.keeper.swap.started())
}

func (c *call) resize(ctx context.Context) (wire.Reply, error) {
	if c.req.Size == nil {
		return wire.Reply{}, fmt.Errorf("no size: %w", wire.ErrBadRequest)
	}
	ctr, err := c.running(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	return wire.Reply{}, ctr.stdio.resize(*c.req.Size)
}

func (c *call) reopenLog(ctx context.Context) (wire.Reply, error) {
	ctr, err := c.running(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	return wire.Reply{}, ctr.stdio.log.reopen(c.req.LogDir)
}

func (c *call) running(ctx context.Context) (*container, error) {
	ctr, err := c.container(ctx)
	if err != nil {
		return nil, err
	}
	if !ctr.snapshot().Running() {
		return nil, wire.ErrNotRunning
	}
	return ctr, nil
}

func (c *call) update(ctx context.Context) (wire.Reply, error) {
	ctr, err := c.container(ctx)
	if err != nil {
		return wire.Reply{}, err
	}
	if c.req.Resources == nil {
		return wire.Reply{}, fmt.Errorf("no resources: %w", wire.ErrBadRequest)
	}
	return wire.Reply{}, ctr.update(c.req.Resources)
}

func (c *call) list(context.Context) (wire.Reply, error) {
	return wire.Reply{States: c.keeper.list()}, nil
}

func (c *call) events(ctx context.Context) (wire.Reply, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := c.reply(wire.Reply{}); err != nil {
		return wire.Reply{}, errGone
	}
	gone := c.gone()
	c.keeper.tasks.Go(func() { <-gone; cancel() })
	// Nothing is lost where it is cut off: the caller asks again for what is past the last that it has.
	c.keeper.swap.calls.leave()
	defer c.keeper.swap.calls.enter()
	err := c.keeper.follow(ctx, c.req.Since, func(e wire.Event) error { return c.reply(wire.Reply{Event: &e}) })
	return wire.Reply{}, errors.Join(errGone, err)
}

func (c *call) restart(ctx context.Context) (wire.Reply, error) {
	return wire.Reply{}, c.keeper.restartDaemon(ctx, c.req.Program)
}

func (c *call) replace(ctx context.Context) (wire.Reply, error) {
	return wire.Reply{}, c.keeper.replace(ctx, c) // returns only where the keeper goes on as it was
}

func (c *call) shutdown(context.Context) (wire.Reply, error) {
	// Answered before Run closes the connections: it kills the containers first.
	err := c.reply(wire.Reply{})
	c.keeper.stop()
	return wire.Reply{}, errors.Join(errGone, err)
}
