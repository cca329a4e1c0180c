package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How the size of a writable layer is found.
//
// There is no other way than to look at every file of it: project quotas, which would count for us, are not given to a
// user namespace. A layer of 50,000 files takes 130 ms when they are in the cache, and a second when they are not, and
// the kubelet asks for all containers every ten seconds, some clients more often. So nobody who asks waits for that: they
// are told what was found last, and when. One goroutine measures, one layer after another, those that were asked for
// and whose measure is old; after each it rests four times as long as it has worked, so that whatever the containers
// have written, it takes at most a fifth of one CPU. What grows then is the age of the measures.

const (
	// usageTTL is the age from which a layer is measured again when somebody asks.
	usageTTL = 10 * time.Second
	// usageRest is how many times longer than it works the measuring goroutine rests.
	usageRest = 4
)

// Usage is what a container had written when it was last measured: bytes in whole blocks, and inodes.
type Usage struct {
	Bytes, Inodes uint64
	At            time.Time
}

// meter keeps the measures of writable layers.
type meter struct {
	mu    sync.Mutex // guards what is below
	known map[string]*measure
	due   []*measure
	kick  chan struct{} // of one: there is something due
}

// measure is one layer's. Its fields but the first two belong to the meter's lock.
type measure struct {
	id    string
	first chan struct{} // closed once usage or err is set
	usage Usage
	err   error
	due   bool // in meter.due, or being measured
}

func newMeter() *meter { return &meter{known: map[string]*measure{}, kick: make(chan struct{}, 1)} }

// want returns the measure of a layer and sees to it that it is renewed where it is old.
func (m *meter) want(id string) *measure {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.known[id]
	if l == nil {
		l = &measure{id: id, first: make(chan struct{})}
		m.known[id] = l
	}
	if !l.due && time.Since(l.usage.At) > usageTTL {
		l.due = true
		m.due = append(m.due, l)
		select {
		case m.kick <- struct{}{}:
		default:
		}
	}
	return l
}

// next takes the first that is due; nil where none is.
func (m *meter) next() *measure {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.due) == 0 {
		return nil
	}
	l := m.due[0]
	m.due = m.due[1:]
	return l
}

func (m *meter) set(l *measure, usage Usage, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.usage, l.err, l.due = usage, err, false
	m.releaseLocked(l)
}

// releaseLocked lets those go who wait for the first measure.
func (m *meter) releaseLocked(l *measure) {
	select {
	case <-l.first:
	default:
		close(l.first)
	}
}

func (m *meter) last(l *measure) (Usage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return l.usage, l.err
}

// forget drops a layer that goes away.
func (m *meter) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.known[id]
	if l == nil {
		return
	}
	delete(m.known, id)
	l.err = fmt.Errorf("root filesystem of container %s: %w", id, ErrNotFound)
	m.releaseLocked(l)
}

// RootfsUsage returns what a container had written when it was last measured, some ten seconds ago or longer where much
// was written. It waits, until ctx ends, only for a container that never was measured.
func (s *Store) RootfsUsage(ctx context.Context, containerID string) (Usage, error) {
	l := s.meter.want(containerID)
	if s.index.mount(kindRootfs+"/"+containerID) == nil { // asked after want: what goes now is forgotten after it went
		s.meter.forget(containerID)
		return Usage{}, fmt.Errorf("root filesystem of container %s: %w", containerID, ErrNotFound)
	}
	select {
	case <-l.first:
		return s.meter.last(l)
	default:
	}
	select {
	case <-l.first:
		return s.meter.last(l)
	case <-ctx.Done():
		return Usage{}, fmt.Errorf("root filesystem of container %s is not measured yet: %w", containerID, ctx.Err())
	case <-s.life.ctx.Done():
		return Usage{}, ErrClosed
	}
}

// measureDue measures what is due until the store is closed.
func (s *Store) measureDue() {
	for {
		l := s.meter.next()
		if l == nil {
			select {
			case <-s.meter.kick:
				continue
			case <-s.life.ctx.Done():
				return
			}
		}
		began := time.Now()
		usage, err := s.measureRootfs(s.life.ctx, l.id)
		if s.life.ctx.Err() != nil {
			return
		}
		if err != nil && !isAbsent(err) {
			s.log.Warn("a container's disk use is not known", "container", l.id, "error", err)
		}
		s.meter.set(l, usage, err)
		if sleep(s.life.ctx, usageRest*time.Since(began)) != nil {
			return
		}
	}
}

// measureRootfs looks at everything that a container has written. Its answer is of the time when it began.
func (s *Store) measureRootfs(ctx context.Context, containerID string) (Usage, error) {
	rec := s.index.mount(kindRootfs + "/" + containerID)
	if rec == nil {
		return Usage{}, fmt.Errorf("root filesystem of container %s: %w", containerID, ErrNotFound)
	}
	dir := s.path(kindRootfs, containerID, "upper")
	if rec.Driver == driverCopy {
		dir = s.path(kindRootfs, containerID, "merged")
	}
	usage, err := diskUsage(ctx, dir)
	if err != nil {
		err = fmt.Errorf("measure root filesystem of container %s: %w", containerID, err)
	}
	return usage, err
}

// diskUsage sums up a tree, a file with several names once. Names that vanish meanwhile do not count. The time is told
// with an error, too: it was tried then.
//
// The tree belongs to a container that runs: it may put a link, or a pipe that nobody writes to, in the place of a
// directory that is about to be read. So each is opened below the root and as a directory, and read only where it is
// the one that was counted. io/fs would not do: it opens whatever is there, and takes no name that is not UTF-8.
func diskUsage(ctx context.Context, dir string) (Usage, error) {
	w := walk{usage: Usage{At: time.Now()}, seen: map[uint64]bool{}}
	var top unix.Stat_t
	err := unix.Lstat(dir, &top)
	if errors.Is(err, fs.ErrNotExist) {
		return w.usage, nil
	} else if err != nil {
		return w.usage, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return w.usage, err
	}
	defer root.Close()
	w.count(".", "", &top)
	for len(w.due) > 0 {
		next := w.due[len(w.due)-1]
		w.due = w.due[:len(w.due)-1]
		if err := w.read(ctx, root, next); err != nil {
			return w.usage, err
		}
	}
	return w.usage, nil
}

// walk is one look at a tree.
type walk struct {
	usage Usage
	seen  map[uint64]bool
	due   []directory // counted, not read yet
}

// directory is one as it was counted, by its path from the root.
type directory struct {
	path     string
	dev, ino uint64
}

func (w *walk) count(parent, name string, st *unix.Stat_t) {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		w.due = append(w.due, directory{path: filepath.Join(parent, name), dev: st.Dev, ino: st.Ino})
	} else if st.Nlink > 1 {
		if w.seen[st.Ino] {
			return
		}
		w.seen[st.Ino] = true
	}
	w.usage.Bytes += uint64(st.Blocks) * 512
	w.usage.Inodes++
}

// read counts what is in a directory.
func (w *walk) read(ctx context.Context, root *os.Root, d directory) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(d.path) >= unix.PathMax { // to open it costs a system call for each of its parents
		return &fs.PathError{Op: "open", Path: d.path[:64] + "…", Err: unix.ENAMETOOLONG}
	}
	f, err := root.OpenFile(d.path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if moved(err) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &fs.PathError{Op: "stat", Path: d.path, Err: err}
	}
	if st.Dev != d.dev || st.Ino != d.ino {
		return nil
	}
	names, err := f.Readdirnames(-1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch err := unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return &fs.PathError{Op: "stat", Path: filepath.Join(d.path, name), Err: err}
		default:
			w.count(d.path, name, &st)
		}
	}
	return nil
}

// moved tells the errors of a directory that is no longer where it was: its name is gone, or that or the way to it is a
// file or a link now. For a way that leads out os.Root has an error that it does not export, the only one that no
// system call gave.
func moved(err error) bool {
	if err == nil {
		return false
	}
	var errno syscall.Errno
	return !errors.As(err, &errno) || errno == unix.ENOENT || errno == unix.ENOTDIR || errno == unix.ELOOP
}
