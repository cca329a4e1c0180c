package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// Store keeps images, their layers and the containers' root filesystems under one directory. Its methods may be
// called from many goroutines; calls for one container id must not overlap.
type Store struct {
	cfg     Config
	log     *slog.Logger
	lock    *os.File
	boot    string
	ids     idMaps
	fetch   fetching
	meter   *meter
	life    lifetime
	keep    func(layerDir string) bool // tells Open which layers a container has
	hasKept atomic.Bool                // there are layers that were put aside, see putAside

	mounterMu sync.Mutex
	mounter   mounter // guarded by mounterMu

	writeMu sync.Mutex // held over every change of image records, on disk and in the index
	index   *index
}

// fetching is what the pulls share.
type fetching struct {
	slots      slots
	transports transports
	pulls      flightGroup[*imageRecord]
	unpacks    flightGroup[struct{}]
}

// lifetime ends with Close.
type lifetime struct {
	ctx    context.Context
	end    context.CancelFunc
	work   sync.WaitGroup // the background goroutines and running operations
	kick   chan struct{}  // asks background to look for unsynced layers
	mu     sync.Mutex
	closed bool // guarded by mu
}

var storeDirs = []string{"tmp", "layers", "images", "fix", "rootfs", "volumes", "corrupt"}

// Open opens the store at cfg.Root, making it where it is missing, and recovers from whatever stopped the last
// process: half-done work is removed, records that cannot be read are set aside, and layers that a power cut may
// have damaged are dropped. One process may have a store open: ErrLocked otherwise.
// It should run as uid 0 of a user namespace and in the mount namespace that containers are started from.
func Open(cfg Config) (*Store, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.MaxLayerBytes == 0 {
		cfg.MaxLayerBytes = DefaultMaxLayerBytes
	}
	if cfg.MaxLayerEntries == 0 {
		cfg.MaxLayerEntries = DefaultMaxLayerEntries
	}
	if cfg.waits == (waits{}) {
		cfg.waits = defaultWaits
	}
	root, err := makeRoot(cfg.Root)
	if err != nil {
		return nil, err
	}
	cfg.Root = root
	s := &Store{cfg: cfg, log: cfg.Log.With("component", "images"), index: newIndex(), meter: newMeter()}
	s.fetch.transports.waits, s.fetch.transports.lookUp = cfg.waits, s.cfg.lookUp
	s.fetch.pulls.log, s.fetch.unpacks.log = s.log, s.log
	s.fetch.slots.each = max(3, runtime.GOMAXPROCS(0))
	s.life.kick = make(chan struct{}, 1)
	if s.lock, err = lockFile(s.path("lock")); err != nil {
		return nil, err
	}
	u := undo{s.lock.Close}
	if s.boot, err = bootID(); err != nil {
		return nil, u.run(err)
	}
	if s.ids, err = readIDMaps(); err != nil {
		return nil, u.run(err)
	}
	stale, err := s.recover()
	if err != nil {
		return nil, u.run(err)
	}
	s.mounter = chooseMounter(s)
	s.life.ctx, s.life.end = context.WithCancel(context.Background())
	s.life.work.Go(func() { s.background(stale) })
	s.life.work.Go(s.measureDue)
	return s, nil
}

// makeRoot makes the store's directories and returns the root without symbolic links: the kubelet looks up the
// filesystem of this very path.
func makeRoot(root string) (string, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return "", fmt.Errorf("open image store: %w", err)
	}
	for _, d := range storeDirs {
		if err := makeStoreDir(filepath.Join(abs, d)); err != nil {
			return "", fmt.Errorf("open image store: %w", err)
		}
	}
	// The layers hold setuid programs that outside of the user namespace are the user's own: nobody else on the
	// machine may get at them.
	info, err := os.Stat(abs)
	if err == nil && info.Mode().Perm() != 0o700 { // a change of nothing may find no room, where a quota is used up
		err = os.Chmod(abs, 0o700)
	}
	if err != nil {
		return "", fmt.Errorf("open image store: %w", err)
	}
	resolved, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", fmt.Errorf("open image store: %w", err)
	}
	return resolved, nil
}

// makeStoreDir makes way for a directory where something else is in its place.
func makeStoreDir(dir string) error {
	if info, err := os.Lstat(dir); err == nil && !info.IsDir() && info.Mode()&os.ModeSymlink == 0 {
		if err := os.Rename(dir, dir+".unreadable"); err != nil {
			return err
		}
		slog.Error("set aside: it is no directory", "path", dir+".unreadable")
	}
	return os.MkdirAll(dir, 0o700)
}

func lockFile(path string) (*os.File, error) {
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		// Nobody has locked it: what is locked is a file.
		if err := errors.Join(os.RemoveAll(path+".unreadable"), os.Rename(path, path+".unreadable")); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
		slog.Error("set aside: it is no file", "path", path+".unreadable")
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("open image store: lock %s: another process has it: %w", path, ErrLocked)
	}
	return f, nil
}

func bootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

// Close ends running pulls, waits for them and for the background work, and gives the lock back. Mounts stay.
func (s *Store) Close() error {
	s.life.mu.Lock()
	again := s.life.closed
	s.life.closed = true
	s.life.mu.Unlock()
	if again {
		return nil
	}
	s.life.end()
	s.life.work.Wait()
	s.fetch.transports.close()
	if err := s.lock.Close(); err != nil {
		return fmt.Errorf("close image store: %w", err)
	}
	return nil
}

// begin ties an operation to the store's life: Close cancels its context and waits for done.
func (s *Store) begin(ctx context.Context) (opCtx context.Context, done func(), err error) {
	s.life.mu.Lock()
	defer s.life.mu.Unlock()
	if s.life.closed {
		return nil, nil, ErrClosed
	}
	s.life.work.Add(1)
	opCtx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life.ctx, func() { cancel(ErrClosed) })
	return opCtx, func() {
		stop()
		cancel(nil)
		s.life.work.Done()
	}, nil
}

// Get finds an image by id, name by tag or digest, or the beginning of its id: ErrNotFound where there is none,
// ErrInvalid where ref is no name or fits more than one image.
func (s *Store) Get(ref string) (Image, error) {
	r, err := s.index.find(ref)
	if err != nil {
		return Image{}, err
	}
	return r.image(), nil
}

// List returns every image, ordered by id.
func (s *Store) List() []Image {
	var out []Image
	for _, r := range s.index.list() {
		out = append(out, r.image())
	}
	return out
}

// Usage is what the layers take on disk; each is counted once.
func (s *Store) Usage() (bytes, inodes uint64) { return s.index.usage() }

// Root is the store's directory, absolute and without symbolic links.
func (s *Store) Root() string { return s.cfg.Root }

// Info tells people how the store works here and why.
func (s *Store) Info() map[string]string {
	images, layers, mounts := s.index.counts()
	m := s.mounting()
	info := map[string]string{
		"root": s.cfg.Root, "rootfsDriver": m.driver, "images": strconv.Itoa(images),
		"layers": strconv.Itoa(layers), "rootfs": strconv.Itoa(mounts), "mappedIDs": s.ids.String(),
	}
	if m.why != "" {
		info["rootfsDriverReason"] = m.why
	}
	return info
}

// image copies what others may see of the record.
func (r *imageRecord) image() Image {
	c := r.file.Config
	return Image{
		ID: r.ID, RepoTags: slices.Sorted(maps.Keys(r.Tags)), RepoDigests: slices.Sorted(slices.Values(r.Digests)), Size: r.Size,
		Config: ImageConfig{
			Entrypoint: slices.Clone(c.Entrypoint), Cmd: slices.Clone(c.Cmd), Env: slices.Clone(c.Env),
			WorkingDir: c.WorkingDir, User: c.User, StopSignal: c.StopSignal,
			Volumes: maps.Clone(c.Volumes), Labels: maps.Clone(c.Labels),
		},
	}
}

// Remove removes the image that ref names, with all its names, as the CRI asks; its layers go unless another
// image or a container's root filesystem needs them. No such image is no error.
func (s *Store) Remove(ref string) error {
	r, err := s.forget(ref)
	if errors.Is(err, ErrNotFound) {
		return nil
	} else if err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	s.log.Info("image removed", "image", ref, "id", r.ID)
	return s.collect()
}

// forget removes an image's record from the disk, and then from the index.
func (s *Store) forget(ref string) (*imageRecord, error) {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	r, err := s.index.find(ref)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(s.imageFile(r.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	crash.Point("images/image-removed")
	if err := syncDir(s.path("images")); err != nil {
		return nil, err
	}
	s.index.dropImage(r.ID)
	return r, nil
}

// commitImage writes r, with the names it gains, and takes those names from the images that had them. The writes
// are ordered so that a crash between them leaves a name at two images, which recover resolves by age.
func (s *Store) commitImage(r *imageRecord, names []string) (*imageRecord, error) {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if old := s.index.image(r.ID); old != nil {
		r = old.merge(r)
	}
	changed := []*imageRecord{r}
	for _, id := range s.index.holders(names) {
		if id == r.ID {
			continue
		}
		loser := s.index.image(id).clone()
		for _, n := range names {
			delete(loser.Tags, n)
		}
		loser.Digests = slices.DeleteFunc(loser.Digests, func(d string) bool { return slices.Contains(names, d) })
		changed = append(changed, loser)
	}
	records := make([]target, len(changed))
	for i, c := range changed {
		records[i] = target{s.imageFile(c.ID), c}
	}
	if err := s.writeRecords(records); err != nil {
		return nil, err
	}
	for _, c := range slices.Backward(changed) { // losers first, as a name is one image's
		s.index.putImage(c)
	}
	return r, nil
}

// merge adds the names of a newer pull of the same image.
func (r *imageRecord) merge(newer *imageRecord) *imageRecord {
	m := newer.clone()
	for tag, at := range r.Tags {
		if _, ok := m.Tags[tag]; !ok {
			m.Tags[tag] = at
		}
	}
	for _, d := range r.Digests {
		if !slices.Contains(m.Digests, d) {
			m.Digests = append(m.Digests, d)
		}
	}
	return m
}

func now() time.Time { return time.Now().UTC() }
