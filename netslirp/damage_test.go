package netslirp

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// damages are what can become of a file of state, each under its name.
var damages = map[string]func(path string) error{
	"truncated": func(path string) error {
		old, err := os.ReadFile(path)
		return errors.Join(err, os.WriteFile(path, old[:len(old)/2], 0o600))
	},
	"empty":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
	"noise":     func(path string) error { return os.WriteFile(path, []byte("\x00\xff{]noise"), 0o600) },
	"newer":     func(path string) error { return os.WriteFile(path, []byte(`{"version":99,"current":[1]}`), 0o600) },
	"shapeless": func(path string) error { return os.WriteFile(path, []byte(`{"version":1,"current":"nowhere"}`), 0o600) },
	"another's": func(path string) error {
		return os.WriteFile(path, []byte(`{"version":2,"podID":"other","link":"x","addresses":["10.88.0.2/16"]}`), 0o600)
	},
	"of a strange network": func(path string) error {
		id := strings.TrimSuffix(filepath.Base(path), ".json")
		return os.WriteFile(path, []byte(`{"version":2,"podID":"`+id+`","link":"x","addresses":["10.88.0.2/32"]}`), 0o600)
	},
	"missing": os.Remove,
	"directory": func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "in"), 0o700))
	},
	"half written, a directory": func(path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path+tempSuffix, "in"), 0o700))
	},
	"unreadable": func(path string) error { return os.Chmod(path, 0) },
}

// TestDamagedState damages each file that a network has, in each way, while there is no daemon. The next one opens; other
// pods have their network as before, new ones get one, no address is given twice, and in the end nothing is left.
func TestDamagedState(t *testing.T) {
	whole := os.Getenv("CORACLE_E2E_FAULTS") != "" // else a quarter of it, in which each file and each damage is
	for i, file := range stateFiles(t) {
		for j, name := range slices.Sorted(maps.Keys(damages)) {
			damage := damages[name]
			if !whole && (i+j)%4 != 0 {
				continue
			}
			t.Run(strings.ReplaceAll(file, "/", " ")+" "+name, func(t *testing.T) {
				l := newLab(t)
				n := l.open()
				hit, other := l.attach(n, "hit", PortMapping{HostPort: 20080, ContainerPort: 80}), l.attach(n, "other")
				serveTCP(t, other.ns, ":80", "other")
				must(t, n.SetPodCIDR("10.99.0.0/24"))
				must(t, n.Close())
				must(t, damage(filepath.Join(l.cfg.Dir, file)))

				n = l.open()
				must(t, n.Reconcile(context.Background(), map[string]bool{"hit": true, "other": true}))
				fresh := l.attach(n, "fresh")
				if fresh.ip == hit.ip || fresh.ip == other.ip {
					t.Errorf("%s was given twice", fresh.ip)
				}
				wantAnswer(t, fresh.ns, "tcp", join(other.ip, 80), "other "+fresh.ip)
				must(t, n.Close())
				n = l.open() // what was mended stays so
				must(t, n.Reconcile(context.Background(), nil))
				l.sweepAside()
				l.checkEmpty(n)
			})
		}
	}
}

// TestAPodWithoutRecordLeavesNothing: a record that is gone takes along what the kernel and the address store have of the pod.
func TestAPodWithoutRecordLeavesNothing(t *testing.T) {
	l := newLab(t)
	n := l.open()
	l.attach(n, "hit")
	must(t, n.Close())
	must(t, os.Remove(filepath.Join(l.cfg.Dir, "pods", "hit.json")))
	n = l.open()
	must(t, n.Reconcile(context.Background(), map[string]bool{"hit": true}))
	l.checkEmpty(n)
}

// stateFiles are the files that a network with pods makes, so that a new kind is not forgotten.
func stateFiles(t *testing.T) (files []string) {
	t.Helper()
	l := newLab(t)
	n := l.open()
	l.attach(n, "hit")
	l.attach(n, "other")
	must(t, n.SetPodCIDR("10.99.0.0/24"))
	must(t, n.Close())
	must(t, filepath.WalkDir(l.cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.Contains(path, "other") && !strings.HasSuffix(path, ".0.3") && !strings.HasSuffix(path, ":3") {
			rel, err := filepath.Rel(l.cfg.Dir, path)
			files = append(files, rel)
			return err
		}
		return err
	}))
	if len(files) < 5 {
		t.Fatalf("only %q were found", files)
	}
	n = l.open()
	must(t, n.Reconcile(context.Background(), nil))
	return files
}

// sweepAside removes what was set aside.
func (l *lab) sweepAside() {
	l.t.Helper()
	must(l.t, filepath.WalkDir(l.cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, unreadable) {
			if err := os.RemoveAll(path); err != nil || !d.IsDir() {
				return err
			}
			return fs.SkipDir
		}
		return err
	}))
}
