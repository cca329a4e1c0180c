package e2e

import (
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// damageAll damages those files of state, in one way: a name that the same file has in any node → path.
func (d *damaged) damageAll(files map[string]string, name string) {
	d.t.Helper()
	for _, path := range files {
		old, err := os.ReadFile(path)
		if err == nil {
			err = errors.Join(os.Remove(path), damages[name](path, old))
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
}

// TestDamagedNode damages every file of a node at once, in each way, and then the whole node dies. The next `coracle up`
// comes up, tells of each record that it cannot read, and pulls and runs as a new node does; nothing is left at its end.
func TestDamagedNode(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	for _, name := range slices.Sorted(maps.Keys(damages)) {
		t.Run(name, func(t *testing.T) {
			h := newHome(t)
			d := &damaged{node: h.up("default"), image: image}
			d.crictl("pull", image)
			d.makeVictim(0)
			files := d.files()
			d.die(d.cmd.Process.Pid)
			d.damageAll(files, name)

			d.node = h.up("default")
			log := d.logged()
			for file, path := range files {
				// A record of the runtime directory is of the node that has died.
				if strings.HasPrefix(file, "data/") && recordFile.MatchString(file) && name != "missing" && name != "unreadable" && !strings.Contains(log, path) {
					t.Errorf("the log does not tell of %s", path)
				}
			}
			d.crictl("pull", image)
			d.pod, _ = d.runPod("control", nil)
			d.makeOther()
			d.removeVictim()
			d.crictl("rmp", "--all", "--force")
			if pods := d.crictl("pods", "-q"); pods != "" {
				t.Errorf("pods that are left: %s", pods)
			}
			if t.Failed() {
				t.Logf("the log:\n%s", tail(d.logged(), 60))
			}
			d.down()
		})
	}
}

// TestDamagedUnderARestart damages every record of the keeper at once, and then both programs are replaced. What runs does not
// notice: the keeper knows its containers itself, and hands them on.
func TestDamagedUnderARestart(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	for _, name := range slices.Sorted(maps.Keys(damages)) {
		t.Run(name, func(t *testing.T) {
			d := &damaged{node: newHome(t).up("default"), image: image}
			d.crictl("pull", image)
			pod, file := d.runPod("runs", nil)
			id := d.start(pod, file, "counts", image, shell("i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"))
			identity := d.exec(id, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22")
			d.victim = map[string]string{pod: "POD", id: "RUNS"}
			files := d.files()
			maps.DeleteFunc(files, func(file, _ string) bool { return !strings.HasPrefix(file, "run/coracle/keeper/") })
			if len(files) == 0 {
				t.Fatal("the keeper has no records")
			}
			d.damageAll(files, name)
			if r := d.coracle("restart", "--keeper"); r.code != 0 {
				t.Fatalf("coracle restart --keeper: exit code %d\n%s%s", r.code, r.out, r.errs)
			}
			eventually(t, 10*time.Second, "exec works", func() error {
				if r := d.try("exec", id, "true"); r.code != 0 {
					return errors.New(r.errs)
				}
				return nil
			})
			if now := d.exec(id, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22"); now != identity {
				t.Errorf("the container was started anew")
			}
			d.crictl("rmp", "--all", "--force")
			d.down()
		})
	}
}
