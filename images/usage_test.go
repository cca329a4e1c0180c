package images

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// measured is the first measure of a container.
func measured(t testing.TB, s *Store, id string) Usage {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	u, err := s.RootfsUsage(ctx, id)
	if err != nil || u.At.IsZero() {
		t.Fatalf("usage %+v, %v", u, err)
	}
	return u
}

func TestUsageIsToldFromMemoryAndRenewedBehind(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	id := layeredImage(t, h, "app:1")
	pull(t, s, h.host+"/app:1")
	root := mount(t, s, "c", id)
	first := measured(t, s, "c")
	if err := os.WriteFile(filepath.Join(root, "new"), []byte(strings.Repeat("n", 40_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(context.Background())
	cancel() // what is known is told to those, too, who have no time
	if again, err := s.RootfsUsage(over, "c"); err != nil || again != first {
		t.Errorf("a young measure is %+v, %v, want %+v again", again, err, first)
	}
	l := s.meter.want("c")
	s.meter.set(l, Usage{Bytes: first.Bytes, Inodes: first.Inodes, At: first.At.Add(-usageTTL)}, nil)
	if again, err := s.RootfsUsage(over, "c"); err != nil || again.Bytes != first.Bytes {
		t.Errorf("an old measure is %+v, %v, want it told at once", again, err)
	}
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		again := measured(t, s, "c")
		if again.Inodes == first.Inodes+1 && again.At.After(first.At) && again.Bytes >= first.Bytes+40_000 {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("the old measure was not renewed: %+v", again)
		}
	}
	if err := s.UnmountRootfs("c"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RootfsUsage(over, "c"); !errors.Is(err, ErrNotFound) || len(s.meter.known) != 0 {
		t.Errorf("usage of a container that was removed: %v, and %d are remembered", err, len(s.meter.known))
	}
}

// unmetered is a store with one container and nobody who measures.
func unmetered() *Store {
	s := &Store{index: newIndex(), meter: newMeter()}
	s.life.ctx, s.life.end = context.WithCancel(context.Background())
	s.index.putMount(kindRootfs+"/c", &rootfsRecord{})
	return s
}

func TestUsageThatIsNotMeasuredYet(t *testing.T) {
	s := unmetered()
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	for range 3 {
		if u, err := s.RootfsUsage(ctx, "c"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%+v, %v, want the end of the time", u, err)
		}
	}
	if len(s.meter.due) != 1 {
		t.Errorf("asked three times, it is due %d times", len(s.meter.due))
	}
	s.life.end()
	if _, err := s.RootfsUsage(context.Background(), "c"); !errors.Is(err, ErrClosed) {
		t.Errorf("of a closed store: %v", err)
	}
}

func TestUsageOfAContainerThatGoesWhileSomebodyWaits(t *testing.T) {
	s := unmetered()
	s.meter.want("c")
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if u, err := s.RootfsUsage(context.Background(), "c"); !errors.Is(err, ErrNotFound) {
				t.Errorf("%+v, %v, want ErrNotFound", u, err)
			}
		})
	}
	time.Sleep(5 * time.Millisecond) // most of them wait by now; those who come later must not hang either
	s.index.dropMount(kindRootfs + "/c")
	s.meter.forget("c")
	s.meter.forget("c")
	wg.Wait()
}

func TestDiskUsageEndsWithTheStore(t *testing.T) {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if u, err := diskUsage(over, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestDiskUsageOfATree(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "not\xffUTF-8", "b")
	for _, err := range []error{
		os.MkdirAll(deep, 0o755),
		os.WriteFile(filepath.Join(deep, "file"), []byte(strings.Repeat("x", 40_000)), 0o644),
		os.Link(filepath.Join(deep, "file"), filepath.Join(dir, "again")),
		os.Symlink("/", filepath.Join(dir, "out")),
		unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	u, err := diskUsage(context.Background(), dir)
	if err != nil || u.Inodes != 7 || u.Bytes < 40_000 || u.Bytes >= 80_000 || u.At.IsZero() {
		t.Errorf("usage of 4 directories, a file of two names, a link and a pipe: %+v, %v", u, err)
	}
	if u, err := diskUsage(context.Background(), filepath.Join(dir, "none")); err != nil || u.Inodes != 0 || u.At.IsZero() {
		t.Errorf("of a layer that went away: %+v, %v", u, err)
	}
}

// A container may put anything in the place of a directory after that was counted and before it is read.
func TestDiskUsageOfADirectoryThatIsSwapped(t *testing.T) {
	outside := t.TempDir()
	mkdirs(t, filepath.Join(outside, "sub", "below"))
	for what, swap := range map[string]func(path string) error{
		"link out":     func(path string) error { return os.Symlink(outside, path) },
		"link upwards": func(path string) error { return os.Symlink("../../../../../..", path) },
		"link inside":  func(path string) error { return os.Symlink("other", path) },
		"link in a circle": func(path string) error {
			return errors.Join(os.Symlink(path+"2", path), os.Symlink(path, path+"2"))
		},
		"dead link":       func(path string) error { return os.Symlink("nowhere", path) },
		"file":            func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"pipe":            func(path string) error { return unix.Mkfifo(path, 0o644) },
		"nothing":         func(string) error { return nil },
		"other directory": func(path string) error { return os.Mkdir(path, 0o755) },
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			mkdirs(t, filepath.Join(dir, "a", "sub"), filepath.Join(dir, "other", "sub"))
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			// The walk has counted a and the directory in it, and is about to read both.
			w := walk{seen: map[uint64]bool{}}
			for _, path := range []string{"a", "a/sub"} {
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(dir, path), &st); err != nil {
					t.Fatal(err)
				}
				w.count(path, "", &st)
			}
			// The old one is kept under another name, so that its inode is not given out again.
			if err := errors.Join(os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "kept")), swap(filepath.Join(dir, "a"))); err != nil {
				t.Fatal(err)
			}
			counted := w.usage
			for _, d := range w.due {
				if err := w.read(context.Background(), root, d); err != nil {
					t.Errorf("read %s: %v", d.path, err)
				}
			}
			if w.usage != counted || len(w.due) != 2 {
				t.Errorf("usage %+v, was %+v; to be read: %v", w.usage, counted, w.due)
			}
		})
	}
}

func mkdirs(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkUsage is the measure of a layer of 10,000 files, and what an answer costs.
func BenchmarkUsage(b *testing.B) {
	dir := b.TempDir()
	for i := range 100 {
		sub := filepath.Join(dir, strings.Repeat("d", i+1))
		if err := os.Mkdir(sub, 0o755); err != nil {
			b.Fatal(err)
		}
		for j := range 99 {
			if err := os.WriteFile(filepath.Join(sub, strings.Repeat("f", j+1)), nil, 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("measure", func(b *testing.B) {
		for b.Loop() {
			if _, err := diskUsage(context.Background(), dir); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("answer", func(b *testing.B) {
		s := unmetered()
		s.meter.set(s.meter.want("c"), Usage{At: time.Now()}, nil)
		for b.Loop() {
			if _, err := s.RootfsUsage(context.Background(), "c"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
