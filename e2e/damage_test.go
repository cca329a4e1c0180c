package e2e

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// damages are what can become of a file of state, each under its name. The file itself has been moved away by then, with
// those who have it open.
var damages = map[string]func(path string, old []byte) error{
	"truncated": func(path string, old []byte) error { return os.WriteFile(path, old[:len(old)/2], 0o600) },
	"empty":     func(path string, _ []byte) error { return os.WriteFile(path, nil, 0o600) },
	"noise":     func(path string, _ []byte) error { return os.WriteFile(path, []byte("\x00\xff{]noise"), 0o600) },
	"newer": func(path string, _ []byte) error {
		return os.WriteFile(path, []byte(`{"version":99,"record":{"new":[1]}}`), 0o600)
	},
	"missing":    func(string, []byte) error { return nil },
	"directory":  func(path string, _ []byte) error { return os.MkdirAll(filepath.Join(path, "inside"), 0o700) },
	"unreadable": func(path string, old []byte) error { return os.WriteFile(path, old, 0) },
}

// TestDamagedFiles damages each file of a node that has pods, in each way, and kills the daemon. It comes up again, serves
// what is left, and says in the log what it has set aside; the other pod does not notice; and what is left of the victim
// can be removed, whole. It takes every file that a node has, so that none is forgotten. Without CORACLE_E2E_FAULTS it is
// a sample, in which each damage is and every third file; the packages' own tests have the others.
func TestDamagedFiles(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	d := &damaged{image: pushBusybox(t, registry)}
	d.node = newHome(t).up("default")
	d.crictl("pull", d.image)
	var file string
	d.pod, file = d.runPod("control", nil)
	d.counts = d.start(d.pod, file, "counts", d.image, shell("i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"))
	d.identity = d.exec(d.counts, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22")

	d.makeVictim(0)
	files := d.files()
	d.removeVictim()
	d.before = d.inventory()
	if len(files) < 25 {
		t.Errorf("only %q were found", files)
	}
	names := slices.Sorted(maps.Keys(damages))
	whole := os.Getenv("CORACLE_E2E_FAULTS") != ""
	count, ran := 0, 0 // a pattern may choose some of them
	for i, file := range slices.Sorted(maps.Keys(files)) {
		for j, name := range names {
			if !whole && (i%3 != 0 || (i/3+j)%len(names) != 0) {
				continue
			}
			count++
			t.Run(name+" "+strings.ReplaceAll(file, "/", " "), func(t *testing.T) {
				d.t, d.home.t = t, t
				ran++
				d.try1(count, file, name)
			})
			d.t, d.home.t = t, t
		}
	}
	t.Logf("%d files of %d kinds of damage: %d tried", len(files), len(names), ran)
	if log := d.logged(); ran == count && !strings.Contains(log, "set aside") {
		t.Errorf("nothing was set aside:\n%s", tail(log, 20))
	}
	d.crictl("rmp", "--all", "--force")
	d.down()
}

type damaged struct {
	*node
	image, pod, counts, identity string
	before                       []string
	victim                       map[string]string // part of a path → the word that stands for it
}

// makeVictim runs the pod whose files are damaged.
func (d *damaged) makeVictim(number int) {
	d.t.Helper()
	name := "victim" + strconv.Itoa(number)
	pod, file := d.runPod(name, object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": 18216}},
		"linux": object{"security_context": object{"namespace_options": object{"pid": 0}}}})
	runs := d.start(pod, file, "runs", d.image, shell("sleep 100000"))
	done := d.start(pod, file, "done", d.image, shell("exit 4"))
	eventually(d.t, 10*time.Second, "the end of one", func() error {
		if s := d.inspect("inspect", done).text("state"); s != "CONTAINER_EXITED" {
			return errors.New(s)
		}
		return nil
	})
	d.victim = map[string]string{pod: "POD", runs: "RUNS", done: "DONE"}
	for i, ip := range append([]string{d.podIP(pod)}, d.moreIPs(pod)...) {
		d.victim[ip] = "IP" + strconv.Itoa(i)
	}
}

func (d *damaged) moreIPs(pod string) (ips []string) {
	more, _ := d.inspect("inspectp", pod).field("network.additionalIps").([]any)
	for _, m := range more {
		if ip, ok := m.(map[string]any)["ip"].(string); ok {
			ips = append(ips, ip)
		}
	}
	return ips
}

// notState are files that are no state: content of images and of pods, logs, and what a container writes.
var notState = regexp.MustCompile(`/(diff|merged|upper|work|fix|tmp|corrupt|ns|etc|shm|history)(/|$)|\.log(\.1)?$|\.unreadable(/|$)|\.pipe$|/rk/netns$`)

// recordFile is one of the records that the daemon reads when it comes up. The keeper reads its own when it is replaced, and history is
// for the node's next start. What can be read as root inside the node is not "unreadable".
var recordFile = regexp.MustCompile(`^data/coracle/(pods|containers|images/(images|layers|rootfs))/|^run/coracle/(pods|containers|net/pods|node\.json)`)

// addressFile is that of an address that is not the victim's.
var addressFile = regexp.MustCompile(`/ipam/([0-9.]+|[0-9a-f]+:[0-9a-f:]+)$`)

// files lists the regular files of the node: a name that stays the same for another victim → path. Those of the control
// pod are left out.
func (d *damaged) files() map[string]string {
	d.t.Helper()
	found := map[string]string{}
	for _, root := range []string{d.runtimeDir(), d.dataDir()} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				return nil
			}
			name := strings.TrimPrefix(path, d.dir+"/")
			if err != nil || !e.Type().IsRegular() || notState.MatchString("/"+name) && !strings.Contains(name, "/history/") {
				return err
			}
			for part, word := range d.victim {
				name = strings.ReplaceAll(name, part, word)
			}
			if !regexp.MustCompile(`[0-9a-f]{64}`).MatchString(name) || strings.Contains(name, "images/layers") || strings.Contains(name, "images/images") {
				found[name] = path
			}
			return nil
		})
		if err != nil {
			d.t.Fatal(err)
		}
	}
	maps.DeleteFunc(found, func(name, _ string) bool { return addressFile.MatchString(name) })
	return found
}

func (d *damaged) try1(number int, file, name string) {
	t := d.t
	d.makeVictim(number)
	path := d.files()[file]
	if path == "" {
		t.Skipf("this victim has no %s", file)
	}
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	saved := d.path("work", "saved")
	if err := errors.Join(os.Rename(path, saved), damages[name](path, old)); err != nil {
		t.Fatal(err)
	}
	was, logged := d.daemon(), len(d.logged())
	signal(t, was, syscall.SIGKILL)
	eventually(t, 20*time.Second, "the daemon comes up", func() error {
		if r := d.try("version"); r.code != 0 {
			return errors.New(r.errs)
		}
		if d.daemon() == was {
			return errors.New("it is the old one")
		}
		return nil
	})
	if log := d.logged()[logged:]; name != "missing" && name != "unreadable" && recordFile.MatchString(file) && !strings.Contains(log, path) {
		t.Errorf("the log does not tell of %s:\n%s", path, tail(log, 20))
	}
	if now := d.exec(d.counts, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22"); now != d.identity {
		t.Errorf("the control pod's container was started anew")
	}
	if s := d.inspect("inspectp", d.pod).text("state"); s != "SANDBOX_READY" {
		t.Errorf("the control pod is %s", s)
	}
	d.restoreShared(file, path, saved)
	d.crictl("pull", d.image)
	d.makeOther()
	d.removeVictim()
	d.expectClean()
}

// restoreShared puts back what belongs to no pod, which the node would make anew with its next start alone.
func (d *damaged) restoreShared(file, path, saved string) {
	d.t.Helper()
	for _, word := range []string{"POD", "RUNS", "DONE", "IP", "images/", "net/", "pods", "containers", "history"} {
		if strings.Contains(file, word) {
			if err := os.Remove(saved); err != nil {
				d.t.Error(err)
			}
			return
		}
	}
	if err := errors.Join(os.RemoveAll(path), os.Rename(saved, path)); err != nil {
		d.t.Error(err)
	}
}

// makeOther runs one more pod, which must get everything that a pod gets.
func (d *damaged) makeOther() {
	d.t.Helper()
	pod, file := d.runPod("other", nil)
	id := d.start(pod, file, "echo", d.image, nil)
	if out := d.exec(id, "hostname"); out != "other" {
		d.t.Errorf("another pod: %q", out)
	}
	if ip := d.podIP(pod); ip == d.podIP(d.pod) {
		d.t.Errorf("%s was given twice", ip)
	}
	d.crictl("rmp", "--force", pod)
}

// removeVictim removes what there is of it.
func (d *damaged) removeVictim() {
	d.t.Helper()
	for _, id := range strings.Fields(d.crictl("pods", "-q")) {
		if id != d.pod {
			d.crictl("rmp", "--force", id)
		}
	}
}

// expectClean holds the node to what it had before any victim.
func (d *damaged) expectClean() {
	d.t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		left = slices.DeleteFunc(d.inventory(), func(x string) bool {
			return slices.Contains(d.before, x) || strings.Contains(x, "daemon") || strings.Contains(x, ".unreadable") || strings.Contains(x, "images/corrupt") ||
				strings.Contains(x, "images/tmp/kept-") || // the control pod's
				strings.Contains(x, "usleep") || strings.HasPrefix(x, "listening")
		})
		if len(left) == 0 {
			return
		}
	}
	for _, l := range left {
		d.t.Errorf("left: %s", l)
	}
	d.before = append(d.before, left...) // told once
}
