package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"syscall"
	"time"
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
func diskUsage(ctx context.Context, dir string) (Usage, error) {
	usage := Usage{At: time.Now()}
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || st.Nlink > 1 && !d.IsDir() && seen[st.Ino] {
			return nil
		}
		if st.Nlink > 1 {
			seen[st.Ino] = true
		}
		usage.Bytes += uint64(st.Blocks) * 512
		usage.Inodes++
		return nil
	})
	return usage, err
}
