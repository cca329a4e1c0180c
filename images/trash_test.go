package images

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// TestALayerThatIsRemovedByHalf, since its quota lets nothing be renamed and a directory of it cannot be removed, is not in
// the store, and comes whole when it is pulled again.
func TestALayerThatIsRemovedByHalf(t *testing.T) {
	dir := t.TempDir()
	nstest.Small(t, dir, nstest.UserQuota)
	h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
	l := gzipLayer(t, file("a", "1"), file("busy/b", "2"), file("z", noise(8<<20)))
	h.push(t, "app:1", imageOf(t, l))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	free := nstest.Fill(t, dir)
	busy := filepath.Join(s.layerDir(l.diffID), "diff", "busy")
	if err := unix.Mount("tmpfs", busy, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(h.host + "/app:1"); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("error = %v", err)
	}
	if s.index.layer(l.diffID) != nil || !exists(busy) {
		t.Error("it still counts, or was not in the way")
	}
	if err := unix.Unmount(busy, 0); err != nil {
		t.Fatal(err)
	}
	free()
	nstest.Settle(t, dir)
	pull(t, s, h.host+"/app:1")
	root := mount(t, s, "c1", h.host+"/app:1")
	for name, want := range map[string]string{"a": "1", "busy/b": "2", "z": noise(8 << 20)} {
		if got := read(t, filepath.Join(root, name)); got != want {
			t.Errorf("%s has %d bytes", name, len(got))
		}
	}
	waitSynced(t, s)
}

// TestWhatIsLeftOfALayer may be removed while the layer comes in its place.
func TestWhatIsLeftOfALayer(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	to := s.layerDir(l.diffID)
	for range 30 {
		for _, name := range []string{"1", "2", "3"} {
			if err := os.MkdirAll(filepath.Join(to, "diff", name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		var removals sync.WaitGroup
		removals.Go(func() {
			if err := s.removeTrash(to); err != nil {
				t.Error(err)
			}
		})
		pull(t, s, h.host+"/app:1")
		removals.Wait()
		if err := s.removeTrash(to); err != nil { // as late as can be
			t.Error(err)
		}
		if got := read(t, filepath.Join(to, "diff", "f")); got != "x" {
			t.Fatalf("content %q", got)
		}
		if kept, err := filepath.Glob(s.path("tmp", keptPrefix+"*")); err != nil || len(kept) > 0 {
			t.Fatalf("taken for a later version's: %v, %v", kept, err)
		}
		if err := s.Remove(h.host + "/app:1"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestALayerThatGoesIsNotMarked: nor is one that came in its place, which was not written out.
func TestALayerThatGoesIsNotMarked(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	gone := &layerRecord{Version: recordVersion, DiffID: l.diffID, BootID: s.boot}
	if err := os.MkdirAll(filepath.Join(s.layerDir(l.diffID), "diff"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.markSynced(gone); err != nil || exists(filepath.Join(s.layerDir(l.diffID), "layer.json")) {
		t.Errorf("it has a record: %v", err)
	}
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	now := s.index.layer(l.diffID)
	if err := s.markSynced(gone); err != nil || s.index.layer(l.diffID) != now {
		t.Errorf("the record of a layer is that of another: %v", err)
	}
}
