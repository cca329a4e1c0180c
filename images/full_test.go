package images

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// noise does not compress, and no two are alike.
func noise(size int) string {
	b := make([]byte, size)
	random := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8)})
	for i := range b {
		b[i] = byte(random.Uint64())
	}
	return string(b)
}

// TestAFullStore: where the store's filesystem runs out of bytes or of inodes, a pull and a mount say so, where, and what
// to do; they leave nothing, what was there serves on, and when there is room they work.
func TestAFullStore(t *testing.T) {
	var many []entry
	for i := range 200 {
		many = append(many, file(fmt.Sprint("f", i), ""))
	}
	for what, c := range map[string]struct {
		options string
		large   []entry
	}{
		"space":  {"size=2m", []entry{file("large", noise(3<<20))}},
		"inodes": {"size=32m,nr_inodes=150", many},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			nstest.Small(t, dir, c.options)
			h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
			h.push(t, "small:1", imageOf(t, gzipLayer(t, file("f", "small"))))
			h.push(t, "large:1", imageOf(t, gzipLayer(t, file("g", "before")), gzipLayer(t, c.large...)))
			h.push(t, "small:2", imageOf(t, gzipLayer(t, file("f", "another"))))
			pull(t, s, h.host+"/small:1")
			before := s.List()
			full(t, s, what, func() error { _, err := s.Pull(context.Background(), h.host+"/large:1", nil); return err })
			settle(s)
			checkStore(t, s)
			if got := s.List(); len(got) != 1 || got[0].ID != before[0].ID {
				t.Errorf("images %v", got)
			}

			free := nstest.Fill(t, dir)
			full(t, s, "", func() error { _, err := s.Pull(context.Background(), h.host+"/small:2", nil); return err })
			full(t, s, "", func() error { _, err := s.MountRootfs(context.Background(), "c1", h.host+"/small:1"); return err })
			settle(s)
			checkStore(t, s)
			if exists(s.path("rootfs", "c1")) {
				t.Error("half a root filesystem is left")
			}
			free()
			root := mount(t, s, "c1", h.host+"/small:1")
			if got := read(t, filepath.Join(root, "f")); got != "small" {
				t.Errorf("content %q", got)
			}
			pull(t, s, h.host+"/small:2")
			waitSynced(t, s)
		})
	}
}

// full runs call, which must fail for want of room.
func full(t *testing.T, s *Store, what string, call func() error) {
	t.Helper()
	err := call()
	if !errors.Is(err, ErrFull) || status.Code(grpcError(err)) != codes.ResourceExhausted {
		t.Fatalf("error = %v, code %s", err, status.Code(grpcError(err)))
	}
	for _, word := range []string{"no " + what, s.Root(), "crictl rmi"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v: it does not say %q", err, word)
		}
	}
}

// TestRemovingMakesRoom: what gives room back works where there is none.
func TestRemovingMakesRoom(t *testing.T) {
	t.Run("disk", func(t *testing.T) { removingMakesRoom(t, "size=4m,nr_inodes=300", 1<<20) })
	t.Run("quota", func(t *testing.T) { removingMakesRoom(t, nstest.UserQuota, 8<<20) }) // btrfs sets room aside for each file
}

func removingMakesRoom(t *testing.T, options string, size int) {
	dir := t.TempDir()
	nstest.Small(t, dir, options)
	h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("f1", noise(size)))))
	h.push(t, "app:2", imageOf(t, gzipLayer(t, file("f2", noise(1<<20)))))
	pull(t, s, h.host+"/app:1")
	mount(t, s, "c1", h.host+"/app:1")
	waitSynced(t, s)
	nstest.Fill(t, dir)
	if err := s.UnmountRootfs("c1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(h.host + "/app:1"); err != nil {
		t.Fatal(err)
	}
	nstest.Settle(t, dir)
	pull(t, s, h.host+"/app:2")
}

// TestAStoreIsOpenedOnAFullDisk: a daemon that comes back there serves what is, and takes no worse driver for want of room.
func TestAStoreIsOpenedOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	nstest.Small(t, dir, "size=2m,nr_inodes=1000")
	h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("f", "x"))))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	driver := s.Info()["rootfsDriver"]
	free := nstest.Fill(t, dir)
	s = reopen(t, s)
	if _, err := s.Get(h.host + "/app:1"); err != nil {
		t.Error(err)
	}
	full(t, s, "", func() error { _, err := s.MountRootfs(context.Background(), "c1", h.host+"/app:1"); return err })
	free()
	mount(t, s, "c1", h.host+"/app:1")
	if info := s.Info(); info["rootfsDriver"] != driver || info["rootfsDriverReason"] != "" && driver == driverOverlay {
		t.Errorf("driver %q was %q: %s", info["rootfsDriver"], driver, info["rootfsDriverReason"])
	}
}

// TestNoRoomForTheSecondRecord: a tag that moves takes two records, and the disk has room for one.
func TestNoRoomForTheSecondRecord(t *testing.T) {
	dir := t.TempDir()
	nstest.Small(t, dir, "size=4m,nr_inodes=1000")
	h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
	old := h.push(t, "app:1", imageOf(t, gzipLayer(t, file("f", "old"))))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	next := s.index.image(old).clone()
	next.ID, next.Digests = sum([]byte("next")), nil
	defer nstest.Fill(t, dir)()
	for _, name := range []string{"0", "1", "2", "3"} {
		if err := os.Remove(filler(t, dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	bytes := filler(t, dir, "bytes")
	info, err := os.Stat(bytes)
	if err == nil {
		err = os.Truncate(bytes, (info.Size()-1)/4096*4096)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.commitImage(next, []string{h.host + "/app:1"}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("error = %v", err)
	}
	if exists(s.imageFile(next.ID)) {
		t.Error("one of the two records was written")
	}
	if got, err := s.Get(h.host + "/app:1"); err != nil || got.ID != old {
		t.Errorf("%+v, %v", got, err)
	}
}

// filler is the path of one of the files that nstest.Fill has made.
func filler(t *testing.T, dir, name string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "filler-*", name))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	return found[0]
}

// TestAStoreIsOpenedWhereALayerCannotBePutAside: a layer that cannot be read and that a container has is to go out of the way,
// for which a used-up quota leaves no room.
func TestAStoreIsOpenedWhereALayerCannotBePutAside(t *testing.T) {
	dir := t.TempDir()
	nstest.Small(t, dir, nstest.UserQuota)
	h, s := newHub(t), openStore(t, Config{Root: filepath.Join(dir, "images")})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("f", "kept"))))
	pull(t, s, h.host+"/app:1")
	root := mount(t, s, "c1", h.host+"/app:1")
	waitSynced(t, s)
	must(t, s.Close())
	layers, err := filepath.Glob(s.path("layers", "*", "layer.json"))
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers %v, %v", layers, err)
	}
	must(t, os.WriteFile(layers[0], []byte("no record"), 0o600))
	free := nstest.Fill(t, dir)
	s = openStore(t, s.cfg)
	if !exists(layers[0]) {
		t.Error("there was room to put the layer aside: nothing is tested")
	}
	if got := read(t, filepath.Join(root, "f")); got != "kept" {
		t.Errorf("the container's file says %q", got)
	}
	free()
	nstest.Settle(t, dir)
	must(t, s.UnmountRootfs("c1"))
	must(t, s.Close())
	s = openStore(t, s.cfg)
	eventuallyEmpty(t, s, "tmp")
	pull(t, s, h.host+"/app:1")
}

// TestAStoreThatIsRightIsNotChanged: a change of nothing may find no room.
func TestAStoreThatIsRightIsNotChanged(t *testing.T) {
	dir := t.TempDir()
	nstest.Small(t, dir, "size=1m")
	root := filepath.Join(dir, "images")
	if _, err := makeRoot(root); err != nil {
		t.Fatal(err)
	}
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")) // whatever is written fails
	if _, err := makeRoot(root); err != nil {
		t.Error(err)
	}
}

// TestWhatIsScarce: what of a filesystem ran out is told when a little of it has come back, too.
func TestWhatIsScarce(t *testing.T) {
	for what, c := range map[string]struct {
		st   unix.Statfs_t
		want bool
	}{
		"inodes":           {unix.Statfs_t{Files: 150, Ffree: 0, Blocks: 8192, Bavail: 8000}, true},
		"nearly inodes":    {unix.Statfs_t{Files: 150, Ffree: 2, Blocks: 8192, Bavail: 8000}, true},
		"bytes":            {unix.Statfs_t{Files: 1000, Ffree: 900, Blocks: 512, Bavail: 0}, false},
		"nearly bytes":     {unix.Statfs_t{Files: 1000, Ffree: 900, Blocks: 512, Bavail: 8}, false},
		"bytes of a btrfs": {unix.Statfs_t{Blocks: 512}, false},
		"neither any more": {unix.Statfs_t{Files: 1000, Ffree: 350, Blocks: 1000, Bavail: 400}, false},
		"both":             {unix.Statfs_t{Files: 1000, Blocks: 512}, false},
	} {
		if got := scarce(&c.st); got != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestQuotaIsToldToo(t *testing.T) {
	s := openStore(t, Config{})
	err := s.full(fmt.Errorf("write file: %w", syscall.EDQUOT))
	if status.Code(grpcError(err)) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no quota left for "+s.Root()) {
		t.Errorf("%v", err)
	}
	if err := s.full(syscall.EIO); !errors.Is(err, syscall.EIO) || errors.Is(err, ErrFull) {
		t.Errorf("%v", err)
	}
}
