package images

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// damages are what can become of a file of the store, each under its name.
var damages = []struct {
	name string
	do   func(path string) error
}{
	{"truncated", func(path string) error {
		old, err := os.ReadFile(path)
		return errors.Join(err, os.WriteFile(path, old[:len(old)/2], 0o600))
	}},
	{"empty", func(path string) error { return os.WriteFile(path, nil, 0o600) }},
	{"noise", func(path string) error { return os.WriteFile(path, []byte("\x00\xff{]noise"), 0o600) }},
	{"newer", func(path string) error { return os.WriteFile(path, []byte(`{"version":99,"layers":{"new":1}}`), 0o600) }},
	{"null", func(path string) error { return os.WriteFile(path, []byte("null"), 0o600) }},
	{"hollow", func(path string) error { return os.WriteFile(path, []byte(`{"version":1}`), 0o600) }},
	{"missing", os.Remove},
	{"directory", func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "in"), 0o700))
	}},
	{"half written, a directory", func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path+".tmp", "in"), 0o700))
	}},
}

// TestDamagedStore damages each record of a store that has a container, in each way, while no process has it. The next one
// opens it; the container's files are there as before, what is not can be pulled again, and in the end nothing is left.
func TestDamagedStore(t *testing.T) {
	h := newHub(t)
	ref := h.host + "/app:1"
	layeredImage(t, h, "app:1")
	for _, damage := range damages {
		for _, file := range storeFiles(t, ref) {
			t.Run(damage.name+" "+strings.ReplaceAll(file, "/", " "), func(t *testing.T) {
				s, root := storeWithContainer(t, ref)
				cfg := s.cfg
				must(t, s.Close())
				must(t, damage.do(filepath.Join(cfg.Root, file)))
				for range 2 { // what was set aside stays so
					s = openStore(t, cfg)
					checkLayered(t, root)
					must(t, s.Close())
				}
				s = openStore(t, cfg)
				img := pull(t, s, ref)
				checkLayered(t, mount(t, s, "c2", img.ID))
				checkLayered(t, root)
				must(t, s.Reconcile(map[string]bool{"c2": true}))
				must(t, s.UnmountRootfs("c2"))
				must(t, s.Remove(ref))
				if left, _ := filepath.Glob(s.path("tmp", keptPrefix+"*")); len(left) > 0 && damage.name != "newer" {
					t.Errorf("kept for nobody: %v", left)
				}
				must(t, s.Close())
				expectEmptied(t, cfg, damage.name == "newer")
			})
		}
	}
}

// expectEmptied opens the store once more, which is when what was kept for a container goes.
func expectEmptied(t *testing.T, cfg Config, newer bool) {
	t.Helper()
	s := openStore(t, cfg)
	eventuallyEmpty(t, s, "tmp")
	must(t, s.Close())
	for _, sub := range []string{"layers", "fix", "images", "rootfs", "volumes"} {
		left, err := os.ReadDir(s.path(sub))
		if err != nil || len(left) > 0 && !newer { // what a newer version wrote is left for that
			t.Errorf("left in %s: %v, %v", sub, left, err)
		}
	}
}

func storeWithContainer(t *testing.T, ref string) (*Store, string) {
	t.Helper()
	s := openStore(t, Config{})
	img := pull(t, s, ref)
	root := mount(t, s, "c1", img.ID)
	t.Cleanup(func() { _ = unmount(root) })
	return s, root
}

// storeFiles are the records that a store with a container has, so that a new kind is not forgotten.
func storeFiles(t *testing.T, ref string) (files []string) {
	t.Helper()
	s, _ := storeWithContainer(t, ref)
	must(t, filepath.WalkDir(s.cfg.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{"diff", "merged", "upper", "work", "tmp"}, d.Name()) || d.IsDir() && filepath.Dir(path) == s.path("fix") {
			return fs.SkipDir
		}
		if d.Type().IsRegular() {
			rel, err := filepath.Rel(s.cfg.Root, path)
			files = append(files, rel)
			return err
		}
		return nil
	}))
	must(t, s.UnmountRootfs("c1"))
	must(t, s.Close())
	if len(files) < 6 { // three layers, an image, a root filesystem, the lock
		t.Fatalf("only %q were found", files)
	}
	return files
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventuallyEmpty(t *testing.T, s *Store, sub string) {
	t.Helper()
	var left []fs.DirEntry
	for range 400 {
		var err error
		if left, err = os.ReadDir(s.path(sub)); err == nil && len(left) == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("left in %s: %v", sub, left)
}
