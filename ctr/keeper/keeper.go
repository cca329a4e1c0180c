package keeper

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// SocketName is the keeper's socket in the runtime directory.
const SocketName = "keeper.sock"

// stopTimeout bounds the end of the node: killing the containers, then stopping the daemon.
const stopTimeout = 15 * time.Second

// Config tells a keeper where it lives and what it starts.
type Config struct {
	// RuntimeDir holds the socket and the records; it exists and is private to the user.
	RuntimeDir string
	Version    string
	// Daemon is the command to keep running; empty starts none.
	Daemon []string
	Log    *slog.Logger
	// Handover is what another program has left to this one, which runs in its process; nil for a keeper that begins.
	Handover *Handover
}

// Keeper owns the containers of one node.
type Keeper struct {
	cfg      Config
	log      *slog.Logger
	bootID   string
	children *children
	journal  *journal
	listener *net.UnixListener
	tasks    sync.WaitGroup // calls and container watchers
	swap     swap
	filters  filterStore // compiled seccomp profiles
	sealed   sealedProgram
	moved    sync.Once // see bornElsewhere
	help     sync.Map  // what commands of runtime programs say of themselves, see run.takes

	supervisor supervisor

	stopped  context.Context // ended by stop: Run is to end
	stop     context.CancelFunc
	callCtx  context.Context // the life of calls, which lasts until the containers and the daemon are gone
	endCalls context.CancelFunc

	mu         sync.Mutex
	containers map[string]*container
	conns      map[*wire.Conn]struct{}
	closing    bool
}

func newKeeper(cfg Config) *Keeper {
	k := &Keeper{cfg: cfg, log: cfg.Log, children: newChildren(cfg.Log), journal: newJournal(), swap: newSwap(),
		containers: map[string]*container{}, conns: map[*wire.Conn]struct{}{}}
	k.filters = filterStore{keeper: k, kept: map[[sha256.Size]byte]*os.File{}}
	k.stopped, k.stop = context.WithCancel(context.Background())
	k.callCtx, k.endCalls = context.WithCancel(context.Background())
	k.supervisor.restarts = make(chan restart)
	if len(cfg.Daemon) > 0 {
		k.supervisor.program.path, k.supervisor.args = cfg.Daemon[0], cfg.Daemon[1:]
	}
	return k
}

// Open reads the records that an earlier keeper left, where nobody swept them, and listens; or it takes over what the
// program left that ran in this process before. Run serves.
func Open(cfg Config) (*Keeper, error) {
	k := newKeeper(cfg)
	if cfg.Handover != nil {
		if err := k.adopt(cfg.Handover); err != nil {
			return nil, fmt.Errorf("take over: %w", err)
		}
		return k, nil
	}
	var boot [16]byte
	if _, err := rand.Read(boot[:]); err != nil {
		return nil, fmt.Errorf("make boot id: %w", err)
	}
	k.bootID = hex.EncodeToString(boot[:])
	if err := os.MkdirAll(k.recordDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make record directory: %w", err)
	}
	// What the engines kept was about processes that ended with the earlier keeper's pid namespace.
	for _, stale := range []string{k.stateDir(), k.programState(), k.bundleDir()} {
		if err := os.RemoveAll(stale); err != nil {
			return nil, fmt.Errorf("remove stale container state: %w", err)
		}
	}
	if err := k.loadRecords(); err != nil {
		return nil, err
	}
	if err := k.listen(); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *Keeper) recordDir() string { return filepath.Join(k.cfg.RuntimeDir, wire.RecordDir) }
func (k *Keeper) stateDir() string  { return filepath.Join(k.recordDir(), "lc") }

func (k *Keeper) listen() error {
	path := filepath.Join(k.cfg.RuntimeDir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen on keeper socket: %w", err)
	}
	// Whoever connects before the chmod is still asked for its uid.
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(fmt.Errorf("restrict keeper socket: %w", err), l.Close())
	}
	k.listener = l
	return nil
}

// Run serves until ctx ends or a caller asks for the shutdown. Then it kills every container, stops the daemon,
// and returns when no goroutine and no process of the keeper is left.
func (k *Keeper) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, k.stop)()
	if h := k.cfg.Handover; h != nil {
		k.goOn(h)
		k.cfg.Handover = nil
	}

	reaperDone := make(chan struct{})
	reaperCtx, stopReaper := context.WithCancel(context.Background())
	go func() { defer close(reaperDone); k.children.run(reaperCtx) }()

	serveDone := make(chan struct{})
	go func() { defer close(serveDone); k.serve() }()

	daemonDone := make(chan struct{})
	daemonCtx, stopDaemon := context.WithCancel(context.Background())
	go func() { defer close(daemonDone); k.superviseDaemon(daemonCtx) }()

	<-k.stopped.Done()
	k.swap.mu.Lock() // for good
	k.log.Info("the node ends: killing every container")
	err := k.killEverything()
	stopDaemon()
	<-daemonDone
	k.closeConns()
	<-serveDone
	if err == nil {
		k.tasks.Wait() // else some watcher never ends, nor would this; the node's end ends the process it waits for
		k.filters.close()
		k.sealed.close()
	}
	stopReaper()
	<-reaperDone
	return err
}

// killEverything ends all containers. Their records stay: who started the keeper disposes of its directory.
func (k *Keeper) killEverything() error {
	k.mu.Lock()
	k.closing = true
	var all []*container
	for _, c := range k.containers {
		all = append(all, c)
	}
	k.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Go(func() { errs[i] = c.destroy(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (k *Keeper) closeConns() {
	_ = k.listener.Close() // ends serve; the socket file goes with it
	k.endCalls()
	k.mu.Lock()
	defer k.mu.Unlock()
	for c := range k.conns {
		_ = c.Close() // gives the call up
	}
}

// lookup finds a container that has been created. It waits while the creation is under way.
func (k *Keeper) lookup(ctx context.Context, id string) (*container, error) {
	k.mu.Lock()
	c := k.containers[id]
	k.mu.Unlock()
	if c == nil {
		return nil, wire.ErrNotFound
	}
	select {
	case <-c.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.init == nil && !c.snapshot().Exited() {
		return nil, wire.ErrNotFound // the creation did not succeed
	}
	return c, nil
}

// reserve puts a container that is still to be created into the table, so that no second one takes its id.
func (k *Keeper) reserve(c *container) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closing {
		return errStopping
	}
	if k.containers[c.id] != nil {
		return wire.ErrExists
	}
	k.containers[c.id] = c
	return nil
}

func (k *Keeper) drop(c *container) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.containers[c.id] == c {
		delete(k.containers, c.id)
	}
}

// list returns a snapshot of each container that has been created.
func (k *Keeper) list() []wire.State {
	k.mu.Lock()
	defer k.mu.Unlock()
	states := make([]wire.State, 0, len(k.containers))
	for _, c := range k.containers {
		if s := c.snapshot(); !s.CreatedAt.IsZero() {
			states = append(states, s)
		}
	}
	return states
}
