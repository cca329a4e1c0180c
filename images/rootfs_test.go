package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// layeredImage has what distinguishes a stack of layers from a copy of the last: whiteouts, opaque directories,
// replaced names, links, attributes, and layers that leave out directories.
func layeredImage(t *testing.T, h *hub, tag string) string {
	big := strings.Repeat("b", 100_000)
	id := h.push(t, tag, imageOf(t,
		gzipLayer(t,
			entry{name: "./", kind: tar.TypeDir, mode: 0o711},
			dir("etc", 0o755), file("etc/removed", "r"), file("etc/changed", "old"), file("etc/kept", big),
			dir("hidden", 0o755), file("hidden/a", "a"), file("hidden/b", "b"),
			dir("gone", 0o755), file("gone/x", "x"),
			entry{name: "tmp", kind: tar.TypeDir, mode: 0o1777}, entry{name: "home", kind: tar.TypeDir, mode: 0o750, uid: 1000, gid: 1000},
			dir("turns", 0o755), file("turns/into-file", "t"), file("becomes", "f"),
			entry{name: "su", kind: tar.TypeReg, mode: 0o4755, body: "su"},
		),
		gzipLayer(t, whiteout("etc/.wh.removed"), file("etc/changed", "new"), file("tmp/from-layer", "t"), whiteout(".wh.gone"),
			file("home/user/file", "h")),
		gzipLayer(t, dir("hidden", 0o700), whiteout("hidden/.wh..wh..opq"), file("hidden/c", "c"), whiteout(".wh.turns"), file("turns", "a file"),
			whiteout(".wh.becomes"), dir("becomes", 0o755), file("becomes/dir", "d"),
			hardlink("hidden/d", "hidden/c"), symlink("s", "etc/kept"), entry{name: "pipe", kind: tar.TypeFifo, mode: 0o600}),
	))
	return id
}

func checkLayered(t *testing.T, root string) {
	t.Helper()
	for path, want := range map[string]string{"etc/changed": "new", "hidden/c": "c", "hidden/d": "c", "turns": "a file", "becomes/dir": "d",
		"tmp/from-layer": "t", "home/user/file": "h", "su": "su", "s": strings.Repeat("b", 100_000)} {
		if got := read(t, filepath.Join(root, path)); got != want {
			t.Errorf("%s = %.20q, want %.20q", path, got, want)
		}
	}
	for _, path := range []string{"etc/removed", "hidden/a", "hidden/b", "gone"} {
		if exists(filepath.Join(root, path)) {
			t.Errorf("%s is there", path)
		}
	}
	for path, want := range map[string]uint32{".": unix.S_IFDIR | 0o711, "tmp": unix.S_IFDIR | 0o1777, "home": unix.S_IFDIR | 0o750,
		"home/user": unix.S_IFDIR | 0o755, "hidden": unix.S_IFDIR | 0o700, "su": unix.S_IFREG | 0o4755, "pipe": unix.S_IFIFO | 0o600} {
		if st := lstat(t, filepath.Join(root, path)); st.Mode != want {
			t.Errorf("%s has mode %o, want %o", path, st.Mode, want)
		}
	}
	if st := lstat(t, root+"/home"); st.Uid != 1000 && nstest.IDs() > 1 {
		t.Errorf("home belongs to %d", st.Uid)
	}
	if c, d := lstat(t, root+"/hidden/c"), lstat(t, root+"/hidden/d"); c.Ino != d.Ino {
		t.Error("hidden/c and hidden/d are two files")
	}
}

func TestRootfs(t *testing.T) {
	h := newHub(t)
	layeredImage(t, h, "app:1")
	for _, driver := range []string{driverOverlay, "old " + driverOverlay, driverFuse, driverCopy} {
		t.Run(driver, func(t *testing.T) {
			s := openStore(t, Config{})
			if s.mounter.driver != driverOverlay {
				t.Fatalf("no overlay here: %s", s.mounter.why)
			}
			s.mounter.old = strings.HasPrefix(driver, "old ")
			s.mounter.driver = strings.TrimPrefix(driver, "old ")
			if driver == driverFuse {
				var err error
				if s.mounter.fuse, err = exec.LookPath("fuse-overlayfs"); err != nil {
					t.Skip("fuse-overlayfs is not installed")
				}
				if err := unix.Access("/dev/fuse", unix.R_OK|unix.W_OK); err != nil {
					t.Skip("/dev/fuse cannot be opened")
				}
			}
			img := pull(t, s, h.host+"/app:1")
			root := mount(t, s, "c1", img.ID)
			checkLayered(t, root)
			if nstest.IDs() > 1 {
				top, err := os.Open(root)
				if err != nil {
					t.Fatal(err)
				}
				defer top.Close()
				cat := exec.Command("cat", "/proc/self/fd/3/etc/changed")
				cat.ExtraFiles = []*os.File{top}
				cat.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
				if out, err := cat.CombinedOutput(); err != nil || string(out) != "new" {
					t.Errorf("another user reads %q, %v", out, err)
				}
			}
			testWrites(t, s, root)
			if _, err := s.MountRootfs(context.Background(), "c1", img.ID); !errors.Is(err, ErrExists) {
				t.Errorf("a second root filesystem of one container: %v", err)
			}
			other := mount(t, s, "c2", h.host+"/app:1")
			if exists(other + "/new") {
				t.Error("c2 sees what c1 wrote")
			}
			for range 2 {
				if err := s.UnmountRootfs("c1"); err != nil {
					t.Fatal(err)
				}
			}
			if exists(s.path(kindRootfs, "c1")) || isMountPoint(root) {
				t.Error("something of c1 is left")
			}
			checkLayered(t, other)
			if err := s.UnmountRootfs("c2"); err != nil {
				t.Fatal(err)
			}
			again := mount(t, s, "c1", img.ID)
			if exists(again + "/new") {
				t.Error("a new root filesystem has what the old one wrote")
			}
		})
	}
}

func testWrites(t *testing.T, s *Store, root string) {
	t.Helper()
	before := measured(t, s, "c1")
	for path, body := range map[string]string{"new": strings.Repeat("n", 40_000), "etc/changed": "mine"} {
		if err := os.WriteFile(filepath.Join(root, path), []byte(body), 0o644); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(root + "/s"); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(root + "/hidden"); err != nil {
		t.Error(err)
	}
	after, err := s.measureRootfs(context.Background(), "c1")
	if err != nil || after.Bytes < before.Bytes+40_000 && s.mounter.driver != driverCopy || after.Inodes == before.Inodes {
		t.Errorf("usage %+v, before %+v: %v", after, before, err)
	}
	if _, err := s.RootfsUsage(context.Background(), "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("usage of no container: %v", err)
	}
}

func TestLayersStayWhileTheyAreMounted(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	id := layeredImage(t, h, "app:1")
	pull(t, s, h.host+"/app:1")
	root := mount(t, s, "c", id)
	if err := s.Remove(id); err != nil {
		t.Fatal(err)
	}
	checkLayered(t, root)
	// A daemon that was killed and came back knows what is mounted.
	waitSynced(t, s)
	s = reopen(t, s)
	checkLayered(t, root)
	if len(s.index.layers) != 3 {
		t.Errorf("%d layers", len(s.index.layers))
	}
	if err := s.Reconcile(map[string]bool{"c": true}); err != nil || !isMountPoint(root) {
		t.Errorf("reconcile with a live container: %v", err)
	}
	if err := s.Reconcile(nil); err != nil {
		t.Fatal(err)
	}
	if isMountPoint(root) || exists(s.path(kindRootfs, "c")) || len(s.index.layers) != 0 || exists(s.fixDir(id)) {
		t.Errorf("something is left: mount %v, %d layers, fix %v", isMountPoint(root), len(s.index.layers), exists(s.fixDir(id)))
	}
}

func TestManyLayersAndLongPaths(t *testing.T) {
	h := newHub(t)
	var layers []*testLayer
	for i := range 120 {
		layers = append(layers, gzipLayer(t, file(fmt.Sprintf("layer%03d", i), fmt.Sprint(i)), file("last", fmt.Sprint(i))))
	}
	layers = append(layers, layers[5]) // overlayfs refuses one directory twice
	h.push(t, "many:1", imageOf(t, layers...))
	for _, old := range []bool{false, true} {
		for _, long := range []bool{false, true} {
			root := t.TempDir()
			if long {
				root = filepath.Join(root, strings.Repeat("l", 200))
			}
			s := openStore(t, Config{Root: root})
			s.mounter.old = old
			pull(t, s, h.host+"/many:1")
			at := mount(t, s, "c", h.host+"/many:1")
			if read(t, at+"/layer000") != "0" || read(t, at+"/layer119") != "119" || read(t, at+"/last") != "5" {
				t.Errorf("old %v, long %v: the layers are not on top of each other", old, long)
			}
		}
	}
}

func TestOpaqueRootHidesWhatIsBeneath(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "o:1", imageOf(t, gzipLayer(t, file("below", "")), gzipLayer(t, whiteout(".wh..wh..opq"), file("middle", "")), gzipLayer(t, file("top", ""))))
	pull(t, s, h.host+"/o:1")
	root := mount(t, s, "c", h.host+"/o:1")
	if exists(root+"/below") || !exists(root+"/middle") || !exists(root+"/top") {
		t.Error("an opaque root was not honoured")
	}
}

func TestImageWithoutLayers(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "scratch:1", imageOf(t))
	img := pull(t, s, h.host+"/scratch:1")
	if img.Size == 0 {
		t.Error("size must be positive")
	}
	root := mount(t, s, "c", img.ID)
	if err := os.WriteFile(root+"/f", nil, 0o644); err != nil {
		t.Error(err)
	}
}

func TestImageVolumes(t *testing.T) {
	h := newHub(t)
	h.push(t, "one:1", imageOf(t, gzipLayer(t, dir("data", 0o755), file("data/file", "f"), symlink("in", "data"), symlink("out", "/etc"), symlink("up", "../../.."),
		entry{name: "pipe", kind: tar.TypeFifo, mode: 0o600})))
	for _, driver := range []string{driverOverlay, driverCopy} {
		s := openStore(t, Config{})
		s.mounter.driver = driver
		pull(t, s, h.host+"/one:1")
		ctx := context.Background()
		for sub, want := range map[string]string{"": "", "data": "/data", "/data/": "/data", "in": "/data", "data/file": "/data/file", "up": "", "../data": "/data"} {
			id := "v" + strings.NewReplacer("/", "-", ".", "-").Replace(sub)
			path, err := s.MountImageVolume(ctx, id, h.host+"/one:1", sub)
			if err != nil || path != s.path(kindVolume, id, "merged")+want {
				t.Errorf("%s: sub path %q is %s, %v", driver, sub, path, err)
			}
			if err := os.WriteFile(s.path(kindVolume, id, "merged", "data/file"), nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("%s: write to a volume: %v", driver, err)
			}
		}
		for sub, want := range map[string]error{"none": ErrNotFound, "data/file/x": ErrNotFound, "out": ErrNotFound, "pipe": ErrInvalid} {
			if _, err := s.MountImageVolume(ctx, "bad", h.host+"/one:1", sub); !errors.Is(err, want) {
				t.Errorf("%s: sub path %q: %v", driver, sub, err)
			}
			if exists(s.path(kindVolume, "bad")) {
				t.Errorf("%s: a failed mount left something", driver)
			}
		}
		for range 2 {
			if err := s.UnmountImageVolume("v"); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestOwnerIDsAreNoPaths(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", ""))))
	pull(t, s, h.host+"/app:1")
	for _, id := range []string{"", ".", "..", "../x", "a/b", "/abs", strings.Repeat("a", 200), "a\x00b"} {
		if _, err := s.MountRootfs(context.Background(), id, h.host+"/app:1"); !errors.Is(err, ErrInvalid) {
			t.Errorf("mount for %.20q: %v", id, err)
		}
		if err := s.UnmountRootfs(id); !errors.Is(err, ErrInvalid) {
			t.Errorf("unmount for %.20q: %v", id, err)
		}
	}
	if _, err := s.MountRootfs(context.Background(), "c", "no-such-image"); !errors.Is(err, ErrNotFound) {
		t.Errorf("no image: %v", err)
	}
}

// A store on overlayfs, as in a container, cannot hold upper directories.
func TestStoreOnOverlayFallsBack(t *testing.T) {
	base := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := mountOverlay(base, []string{base + "/lower"}, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(base + "/merged"); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("PATH", "/nonexistent")
	h, s := newHub(t), openStore(t, Config{Root: base + "/merged/images"})
	if s.Info()["rootfsDriver"] != driverCopy || !strings.Contains(s.Info()["rootfsDriverReason"], "fuse-overlayfs") {
		t.Fatalf("info = %v", s.Info())
	}
	id := layeredImage(t, h, "app:1")
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); err != nil {
		t.Fatal(err)
	}
	checkLayered(t, mount(t, s, "c", id))
}

func TestMountsAreTakenApartTwice(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	pull(t, s, h.host+"/app:1")
	root := mount(t, s, "c", h.host+"/app:1")
	f, err := os.Open(root + "/a") // a process that is still there
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.UnmountRootfs("c"); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(raw), root) {
		t.Error("still mounted")
	}
	// Somebody unmounted it, and somebody removed the directory.
	root = mount(t, s, "c", h.host+"/app:1")
	if err := unmount(root); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(root)); err != nil {
		t.Fatal(err)
	}
	if err := s.UnmountRootfs("c"); err != nil {
		t.Error(err)
	}
}

func TestFixOnlyWhereItIsNeeded(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	plain := h.push(t, "plain:1", imageOf(t, gzipLayer(t, dir("usr", 0o755)), gzipLayer(t, file("usr/bin/x", ""))))
	explicit := h.push(t, "explicit:1", imageOf(t, gzipLayer(t, dir("tmp", 0o1777)), gzipLayer(t, dir("tmp", 0o700), file("tmp/x", ""))))
	removed := h.push(t, "removed:1", imageOf(t, gzipLayer(t, dir("tmp", 0o1777)), gzipLayer(t, whiteout(".wh.tmp")), gzipLayer(t, file("tmp/x", ""))))
	needed := h.push(t, "needed:1", imageOf(t, gzipLayer(t, dir("a", 0o700), dir("a/b", 0o1777)), gzipLayer(t, file("a/b/x", "")), gzipLayer(t, file("a/b/y", ""))))
	for ref, id := range map[string]string{"plain": plain, "explicit": explicit, "removed": removed, "needed": needed} {
		pull(t, s, h.host+"/"+ref+":1")
		pull(t, s, h.host+"/"+ref+":1")
		if got := exists(s.fixDir(id)); got != (ref == "needed") {
			t.Errorf("%s: fix directory: %v", ref, got)
		}
		root := mount(t, s, ref, id)
		want := map[string]uint32{"plain": 0o755, "explicit": 0o700, "removed": 0o755, "needed": 0o1777}[ref]
		path := map[string]string{"plain": "usr", "needed": "a/b"}[ref]
		if path == "" {
			path = "tmp"
		}
		if st := lstat(t, filepath.Join(root, path)); st.Mode&0o7777 != want {
			t.Errorf("%s: %s has mode %o, want %o", ref, path, st.Mode&0o7777, want)
		}
	}
	if st := lstat(t, s.path(kindRootfs, "needed", "merged", "a")); st.Mode&0o7777 != 0o700 {
		t.Errorf("the directory above has mode %o", st.Mode&0o7777)
	}
	if err := s.UnmountRootfs("needed"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(needed); err != nil {
		t.Fatal(err)
	}
	var left []string
	if err := filepath.WalkDir(s.path("fix"), func(p string, _ fs.DirEntry, err error) error { left = append(left, p); return err }); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
