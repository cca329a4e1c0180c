package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// crashEnv makes the test binary the process that TestSIGKILL kills: "ROOT REFERENCE…".
const crashEnv = "CORACLE_IMAGES_CRASH"

// crashChild pulls, mounts, unmounts and removes for ever.
func crashChild() {
	args := strings.Fields(os.Getenv(crashEnv))
	s, err := Open(Config{Root: args[0], DockerConfig: "/nonexistent", Log: slog.New(slog.DiscardHandler), waits: fastWaits})
	if err != nil {
		fmt.Println("child:", err)
		os.Exit(3)
	}
	for n := 0; ; n++ {
		for i, ref := range args[1:] {
			img, err := s.Pull(context.Background(), ref, nil)
			id := fmt.Sprintf("c%d", i)
			if err == nil {
				_, err = s.MountRootfs(context.Background(), id, img.ID)
			}
			if err == nil || errors.Is(err, ErrExists) {
				err = s.UnmountRootfs(id)
			}
			if err == nil && (n+i)%2 == 0 {
				err = s.Remove(ref)
			}
			if err != nil {
				fmt.Println("child:", err)
				os.Exit(4)
			}
		}
	}
}

func TestSIGKILL(t *testing.T) {
	h := newHub(t)
	shared := gzipLayer(t, dir("tmp", 0o1777), file("shared", strings.Repeat("s", 50_000)))
	var many []entry
	for i := range 300 {
		many = append(many, file(fmt.Sprintf("tmp/d%d/f%d", i%17, i), strings.Repeat("m", i*10)))
	}
	large := layerOf(t, compressedZstd, many...)
	refs := []string{h.host + "/a:1", h.host + "/b:1", h.host + "/moving:1"}
	h.push(t, "a:1", imageOf(t, shared, large))
	h.push(t, "b:1", imageOf(t, large, shared))
	moving := []*testLayer{gzipLayer(t, file("v", "1")), gzipLayer(t, file("v", "2"))}
	root := filepath.Join(t.TempDir(), "images")
	rounds := 40
	if testing.Short() {
		rounds = 8
	}
	for round := range rounds {
		h.push(t, "moving:1", imageOf(t, shared, moving[round%2]))
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), crashEnv+"="+root+" "+strings.Join(refs, " "))
		out := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Millisecond + rand.N(70*time.Millisecond))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
			t.Fatalf("round %d: the child ended by itself: %v\n%s", round, err, out)
		}
		afterCrash(t, root, refs)
	}
}

// A daemon that is killed while it tries the rootfs drivers leaves a mount in its temporary directory.
func TestTheMountOfACutOffProbeIsTakenAway(t *testing.T) {
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(root, "tmp", "probe-X")
	if err := os.MkdirAll(filepath.Join(left, "merged"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(left, "merged"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unmount(filepath.Join(left, "merged")) })
	if s, err = Open(Config{Root: root}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range 400 { // a Close may cut it short; then the next Open goes on
		if s, err = Open(Config{Root: root}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
		_, lost := os.Stat(left)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if os.IsNotExist(lost) {
			return
		}
	}
	t.Error("the probe's directory is still there")
}

// afterCrash opens the store as the next daemon would, uses it, empties it and looks for leftovers.
func afterCrash(t *testing.T, root string, refs []string) {
	t.Helper()
	s := openStore(t, Config{Root: root})
	for _, r := range s.index.list() {
		if lost := s.missing(r.Layers); len(lost) > 0 {
			t.Errorf("image %s lacks %v", r.ID, lost)
		}
	}
	if err := s.Reconcile(nil); err != nil {
		t.Error(err)
	}
	for i, ref := range refs {
		img := pull(t, s, ref)
		at := mount(t, s, fmt.Sprint("after", i), img.ID)
		if got := read(t, at+"/shared"); len(got) != 50_000 {
			t.Errorf("shared has %d bytes", len(got))
		}
		if st := lstat(t, at+"/tmp"); st.Mode&0o7777 != 0o1777 {
			t.Errorf("tmp has mode %o", st.Mode&0o7777)
		}
		if err := s.UnmountRootfs(fmt.Sprint("after", i)); err != nil {
			t.Error(err)
		}
	}
	for _, ref := range refs {
		if err := s.Remove(ref); err != nil {
			t.Error(err)
		}
	}
	for _, img := range s.List() { // what a moved tag left behind
		if err := s.Remove(img.ID); err != nil {
			t.Error(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	again, err := Open(s.cfg) // the background work of the first may have been cut short
	if err != nil {
		t.Fatal(err)
	}
	for range 400 {
		if entries, err := os.ReadDir(again.path("tmp")); err == nil && len(entries) == 0 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	for _, sub := range []string{"tmp", "layers", "images", "fix", "rootfs", "volumes", "corrupt"} {
		entries, err := os.ReadDir(filepath.Join(root, sub))
		if err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, %v", sub, entries, err)
		}
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(raw), root) {
		t.Errorf("left mounted: %v", err)
	}
}
