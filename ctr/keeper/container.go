package keeper

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coracle-cri/coracle/ctr/wire"
)

const (
	// drainTimeout bounds how long an exit waits for the last output. A process elsewhere that still holds the
	// pipe must not hide the exit; what it writes later is logged all the same.
	drainTimeout = time.Second

	// killTimeout bounds the wait for processes that were killed. Only one in an uninterruptible sleep takes long.
	killTimeout = 10 * time.Second
)

// container is one container: its facts under mu, and the parent's handles, which are set before ready is closed
// and not changed afterwards.
type container struct {
	keeper *Keeper
	id     string
	ready  chan struct{} // closed when the creation has ended, well or not
	dead   chan struct{} // closed when the init process has ended
	exited chan struct{} // closed when the exit is recorded and told

	engine engine // nil for a container of an earlier keeper
	child  child
	init   *process // a handle on child
	stdio  *stdio
	member membership

	doomed   atomic.Bool    // every process has been, or is about to be, killed by the keeper
	op       sync.RWMutex   // one operation at a time; the start of an exec is a reader
	making   sync.RWMutex   // held for reading while an exec's process is made and not known; within op
	sessions sync.WaitGroup // execs that run

	record  sync.Mutex // held from reading the state to its being on disk; before mu
	behind  bool       // the disk has an older state, and catchUp runs; guarded by record
	removed bool       // the record is not to be written any more; guarded by record

	mu    sync.Mutex
	state wire.State
	seq   uint64 // of the exit event; 0 where there is none
}

func newContainer(k *Keeper, id string) *container {
	return &container{keeper: k, id: id, ready: make(chan struct{}), dead: make(chan struct{}),
		exited: make(chan struct{}), state: wire.State{ID: id}}
}

func (c *container) snapshot() wire.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// create makes a container whose init waits to be started. On an error nothing of it is left.
func (k *Keeper) create(id string, req *wire.Create) (wire.State, error) {
	if err := check(id, req); err != nil {
		return wire.State{}, err
	}
	c := newContainer(k, id)
	if err := k.reserve(c); err != nil {
		return wire.State{}, err
	}
	created := false
	defer func() {
		if !created {
			k.drop(c)
		}
		close(c.ready)
	}()
	if err := c.launch(req); err != nil {
		return wire.State{}, err
	}
	created = true
	return c.snapshot(), nil
}

// launch starts the init process with its streams, and commits the container by its record.
func (c *container) launch(req *wire.Create) (err error) {
	var undo undoStack
	committed := false
	defer func() {
		if !committed {
			err = errors.Join(err, undo.run())
		}
	}()
	streams, err := c.assemble(req, &undo)
	if err != nil {
		return err
	}
	init, err := c.spawn(streams, &undo)
	if err != nil {
		return err
	}
	stdio := streams.connect(req, c.child.tty)
	undo.push(func() error { stdio.close(); return nil })
	member, err := membershipOf(c.child, req.Spec)
	if err != nil {
		return err
	}
	undo.push(func() error { member.release(); return nil })
	state := wire.State{ID: c.id, Pid: init.pid, PidStart: init.start, CreatedAt: time.Now()}
	if err := c.keeper.writeRecord(state); err != nil {
		return err
	}
	committed = true
	c.init, c.stdio, c.member = init, stdio, member
	c.mu.Lock()
	c.state = state
	c.mu.Unlock()
	c.keeper.tasks.Go(c.watch)
	return nil
}

// assemble makes all that the init process needs.
func (c *container) assemble(req *wire.Create, undo *undoStack) (*plumbing, error) {
	log, err := openLogFile(req.LogDir, req.LogPath, c.keeper.log)
	if err != nil {
		return nil, err
	}
	undo.push(func() error { log.close(); return nil })
	streams, err := newPlumbing(req, log)
	if err != nil {
		return nil, err
	}
	undo.push(func() error { streams.abandon(); return nil })
	if c.engine, err = c.keeper.newEngine(c.id, req); err != nil {
		return nil, err
	}
	undo.push(c.engine.destroy)
	return streams, nil
}

// spawn makes the init process, and a handle on it while nobody can have reaped it.
func (c *container) spawn(streams *plumbing, undo *undoStack) (*process, error) {
	pid, err := c.keeper.children.launch(func() (_ int, err error) {
		c.child, err = c.engine.create(streams.ends)
		return c.child.pid, err
	})
	if err != nil {
		return nil, fmt.Errorf("create container: %w", err)
	}
	undo.push(func() (err error) {
		c.keeper.children.collect(pid, func() { err = c.child.abort() })
		return err
	})
	init, err := openProcess(pid)
	if err != nil {
		return nil, err
	}
	undo.push(func() error { init.close(); return nil })
	return init, nil
}

// start lets the init process execute the container's program.
func (c *container) start() (wire.State, error) {
	c.op.Lock()
	defer c.op.Unlock()
	switch s := c.snapshot(); {
	case s.Exited():
		return wire.State{}, fmt.Errorf("it has exited with code %d: %w", s.ExitCode, wire.ErrNotRunning)
	case !s.StartedAt.IsZero():
		return wire.State{}, errors.New("it is started already")
	}
	// Stamped first, so that the exit of a short program is never told without its start.
	c.mu.Lock()
	c.state.StartedAt = time.Now()
	c.mu.Unlock()
	if err := c.engine.start(c.dead); err != nil {
		err = fmt.Errorf("start container: %w", err)
		c.mu.Lock()
		c.state.StartedAt, c.state.Error = time.Time{}, err.Error()
		c.mu.Unlock()
		c.save()
		return wire.State{}, err
	}
	c.save()
	return c.snapshot(), nil
}

// save writes the record of the present state. The transition goes on if that fails: the container is what it is.
func (c *container) save() {
	c.record.Lock()
	defer c.record.Unlock()
	c.persist(c.snapshot())
}

// watch waits for the end of the init process, records it and tells it. It runs once, from the creation on.
func (c *container) watch() {
	if err := c.init.await(); err != nil {
		c.keeper.log.Error("await container", "container", c.id, "error", err)
	}
	finished := time.Now()
	c.keeper.swap.ends.enter()
	defer c.keeper.swap.ends.leave()
	close(c.dead)
	var code int
	c.keeper.children.collect(c.init.pid, func() {
		var err error
		if code, err = c.child.collect(); err != nil {
			c.keeper.log.Error("collect exit status", "container", c.id, "error", err)
		}
	})
	// In a shared pid namespace nobody else ends what the init process has left behind.
	if err := c.empty(); err != nil {
		c.keeper.log.Error("end processes of an exited container", "container", c.id, "error", err)
	}
	for _, o := range c.stdio.outputs() {
		o.drained(time.Until(finished.Add(drainTimeout)))
	}
	c.finish(finished, code)
}

func (c *container) finish(at time.Time, code int) {
	c.record.Lock()
	defer c.record.Unlock()
	s := c.snapshot()
	s.FinishedAt, s.ExitCode, s.OOMKilled = at, code, oomKilled(c.member.cgroup)
	c.persist(s)
	c.mu.Lock()
	c.state.FinishedAt, c.state.ExitCode, c.state.OOMKilled = s.FinishedAt, s.ExitCode, s.OOMKilled
	if s.OOMKilled {
		c.keeper.journal.append(wire.EventOOM, c.state)
	}
	c.seq = c.keeper.journal.append(wire.EventExit, c.state)
	c.mu.Unlock()
	close(c.exited)
}

// kill sends a signal to the init process or to all; a container that has exited already is no error.
func (c *container) kill(req wire.Kill) error {
	if req.Signal <= 0 || req.Signal > 64 {
		return fmt.Errorf("signal %d does not exist: %w", int(req.Signal), wire.ErrBadRequest)
	}
	if c.snapshot().Exited() {
		return nil
	}
	switch {
	case req.Signal == syscall.SIGKILL && req.All:
		return c.killAll()
	case c.child.signal != nil:
		return c.child.signal(req.Signal, req.All)
	case !req.All:
		return c.init.signal(req.Signal)
	}
	members, err := c.members()
	if err != nil {
		return err
	}
	signalProcs(members, req.Signal)
	return nil
}

// destroy kills what lives of the container and takes everything away but its record. It may be called again.
func (c *container) destroy(ctx context.Context) error {
	select {
	case <-c.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.engine == nil {
		return nil // of an earlier keeper, or never created
	}
	// Before op, which the start of an exec may hold: it ends with the container's processes.
	if err := c.killAll(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTimeout+drainTimeout)
	defer cancel()
	select {
	case <-c.exited:
	case <-ctx.Done():
		return fmt.Errorf("await end of process %d: %w", c.init.pid, ctx.Err())
	}
	c.op.Lock()
	defer c.op.Unlock()
	if err := c.empty(); err != nil {
		return err
	}
	c.sessions.Wait()
	c.stdio.close()
	c.init.close()
	return c.engine.destroy()
}

// remove deletes the container: destroy, and the record goes.
func (k *Keeper) remove(ctx context.Context, id string) error {
	c, err := k.lookup(ctx, id)
	if errors.Is(err, wire.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.destroy(ctx); err != nil {
		return fmt.Errorf("delete container: %w", err)
	}
	c.record.Lock()
	c.removed = true
	err = k.removeRecord(id)
	c.record.Unlock()
	if err != nil {
		return err
	}
	k.drop(c)
	return nil
}

// undoStack is run last in, first out.
type undoStack []func() error

func (u *undoStack) push(f func() error) { *u = append(*u, f) }

func (u *undoStack) run() error {
	var errs []error
	for i := len(*u) - 1; i >= 0; i-- {
		errs = append(errs, (*u)[i]())
	}
	return errors.Join(errs...)
}
