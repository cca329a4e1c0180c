package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/coracle-cri/coracle/ctr"
)

// historySettle is how long changes are gathered before they are brought to stable storage together.
const historySettle = time.Second

// history is what became of containers, one file each in the data directory: the status as it was when the container was
// started, or ended. It is what is left of a status when the runtime directory is gone with the node.
//
// A file is replaced, without fsync, before the change is told to anybody. So what the CRI has told is known after the
// death of any process, and of all of them. The files are fsynced a second later, or at the daemon's end, in one go: a
// machine that loses its power forgets what ended in its last seconds, and says that it does not know. To fsync each would
// cost every container some milliseconds twice, for the sake of a moment that is over in a second.
type history struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	dirty map[string]struct{} // ids
	woken chan struct{}       // capacity 1
}

func newHistory(dir string, log *slog.Logger) *history {
	return &history{dir: dir, log: log, dirty: map[string]struct{}{}, woken: make(chan struct{}, 1)}
}

func (h *history) path(id string) string { return filepath.Join(h.dir, id+".json") }

// write records st, which is about to be told.
func (h *history) write(id string, st containerStatus) error {
	if st.StartedAt.IsZero() && st.FinishedAt.IsZero() {
		return nil
	}
	if err := saveStatus(h.path(id), st); err != nil {
		return err
	}
	h.mark(id)
	return nil
}

// mark has a file brought to stable storage.
func (h *history) mark(id string) {
	h.mu.Lock()
	h.dirty[id] = struct{}{}
	h.mu.Unlock()
	select {
	case h.woken <- struct{}{}:
	default:
	}
}

// run brings to stable storage what was written, until ctx ends. What is written after that is close's.
func (h *history) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.woken:
		}
		if !sleep(ctx, historySettle) {
			return
		}
		if err := h.flush(); err != nil {
			h.log.Warn("history of containers is not on stable storage", "error", err)
		}
	}
}

// close brings the rest to stable storage: no second is to follow for it, while the machine may go down right after the
// node. Call it when nobody writes any more.
func (h *history) close() error {
	if err := h.flush(); err != nil {
		return fmt.Errorf("close history: %w", err)
	}
	return nil
}

// flush syncs what is dirty. What could not be synced stays that.
func (h *history) flush() error {
	h.mu.Lock()
	dirty := h.dirty
	h.dirty = map[string]struct{}{}
	h.mu.Unlock()
	if len(dirty) == 0 {
		return nil
	}
	err := h.sync(dirty)
	if err != nil {
		h.mu.Lock()
		maps.Copy(h.dirty, dirty)
		h.mu.Unlock()
	}
	return err
}

// sync is one transaction of the filesystem's journal where there are many files: the first of them takes the others along.
func (h *history) sync(ids map[string]struct{}) error {
	var errs []error
	for id := range ids {
		errs = append(errs, fsync(h.path(id)))
	}
	return errors.Join(append(errs, fsync(h.dir))...)
}

// fsync of what was removed meanwhile is no error.
func fsync(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}

// remove forgets a container, also where something else is in the place of its file.
func (h *history) remove(id string) error {
	if err := os.RemoveAll(h.path(id)); err != nil {
		return fmt.Errorf("remove history: %w", err)
	}
	return nil
}

// sweepHalf removes what a daemon that died was writing, and what else would be in the way of a next file of the name. What
// that daemon had written is on stable storage or not: it counts as dirty. Nobody may write meanwhile.
func (h *history) sweepHalf() error {
	entries, err := os.ReadDir(h.dir)
	errs := []error{err}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			errs = append(errs, os.RemoveAll(filepath.Join(h.dir, e.Name())))
		} else if id, ok := recordID(e); ok {
			h.mark(id)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep half-written history: %w", err)
	}
	return nil
}

// sweep removes what is of no container, and sets aside what is in the way of a file.
func (h *history) sweep(known func(id string) bool, setAside func(path string, cause error)) error {
	entries, err := os.ReadDir(h.dir)
	if err != nil {
		return fmt.Errorf("list history: %w", err)
	}
	var errs []error
	for _, e := range entries {
		id, ok := recordID(e)
		if ok && !known(id) {
			errs = append(errs, h.remove(id))
		} else if ok && e.IsDir() {
			setAside(h.path(id), errors.New("it is a directory"))
		}
	}
	return errors.Join(errs...)
}

// SaveHistory takes over into the data directory what the keeper of a node that is dead has recorded of containers, for a
// daemon that had no time to do so itself. Nobody else is to be at work in either directory.
func SaveHistory(runtimeDir, dataDir string, log *slog.Logger) error {
	store, err := openStore(dataDir, runtimeDir, log)
	if err != nil {
		return err
	}
	states, err := ctr.ReadRecords(runtimeDir)
	if err != nil {
		return fmt.Errorf("read the keeper's records: %w", err)
	}
	var errs []error
	for _, state := range states {
		if _, err := os.Lstat(store.containerSpecPath(state.ID)); err != nil {
			continue // a pod's own process, or removed
		}
		path := store.history.path(state.ID)
		st, err := loadRecord[containerStatus](path)
		if err == nil && !st.FinishedAt.IsZero() || state.StartedAt.IsZero() && state.Error == "" {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			store.setAside(path, err)
			st = containerStatus{}
		}
		st.take(state)
		errs = append(errs, saveSpec(path, st))
	}
	return errors.Join(errs...)
}
