package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// needCrun finds crun, which `make test` installs.
func needCrun(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("crun")
	if err != nil && os.Getenv("CORACLE_TEST_WHOLE") != "" {
		t.Fatal("crun is missing, which scripts/setup.sh --test installs")
	}
	if err != nil {
		t.Skip("crun is missing; to install it, run: scripts/setup.sh --test")
	}
	return path
}

// TestRuntimeHandler runs pods of another runtime handler, crun, as crictl's user does.
func TestRuntimeHandler(t *testing.T) {
	crun := needCrun(t)
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	h := newHome(t)
	h.writeAt(filepath.Join(h.mkdir("config", "coracle"), "config.yaml"), "handlers: {crun: {path: crun}}\n")
	if r := h.coracle("doctor"); r.code != 0 || !strings.Contains(r.out, "ok    runtime handler crun: "+crun+", crun version") {
		t.Errorf("coracle doctor: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	w := &handlerWalk{node: h.up("default"), crun: crun, image: image}
	w.crictl("pull", image)
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{{"told", w.told}, {"run", w.run}, {"exec", w.execute}, {"logs", w.logs}, {"daemon killed", w.daemonKilled}, {"stop and remove", w.remove}} {
		ok := t.Run(step.name, func(t *testing.T) {
			w.t = t
			step.do(t)
		})
		if w.t = t; !ok {
			t.Fatal("a later step needs this one")
		}
	}
	w.down()
}

// handlerWalk is what the steps hand on.
type handlerWalk struct {
	*node
	crun, image  string
	pod, podFile string
	server       string
}

func (w *handlerWalk) told(t *testing.T) {
	r := w.coracle("status", "-v")
	if r.code != 0 || !strings.Contains(r.out, "(default), crun") || !strings.Contains(r.out, `"path":"`+w.crun+`"`) {
		t.Errorf("coracle status -v: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	if out := w.crictl("info"); !strings.Contains(out, `"name": "crun"`) {
		t.Errorf("crictl info does not list the handler:\n%s", out)
	}
	r = w.try("runp", "--runtime", "kata", w.podConfig("none", nil))
	if r.code == 0 || !strings.Contains(r.errs, "InvalidArgument") || !strings.Contains(r.errs, "there are the default one (no name), crun") {
		t.Errorf("crictl runp --runtime kata: exit code %d, %s", r.code, r.errs)
	}
	if out := w.crictl("pods", "-q"); out != "" {
		t.Errorf("left behind: %s", out)
	}
}

func (w *handlerWalk) run(t *testing.T) {
	w.podFile = w.podConfig("handled", nil)
	w.pod = w.crictl("runp", "--runtime", "crun", w.podFile)
	if got := w.inspect("inspectp", w.pod).text("runtimeHandler"); got != "crun" {
		t.Errorf("runtimeHandler of the pod %q", got)
	}
	if out := w.crictl("pods"); !strings.Contains(out, "crun") {
		t.Errorf("crictl pods:\n%s", out)
	}
	w.server = w.start(w.pod, w.podFile, "server", w.image, object{"envs": []object{{"key": "FROM_POD", "value": "yes"}}})
	if state := w.inspect("inspect", w.server).text("state"); state != "CONTAINER_RUNNING" {
		t.Errorf("state %s", state)
	}
	if _, err := os.Stat(w.stateOf(w.server)); err != nil {
		t.Errorf("crun knows nothing of the container: %v", err)
	}
	// A program that is not there is an error of the start, by crun's own sentence.
	id := w.crictl("create", w.pod, w.containerConfig("nothing", w.image, object{"command": []string{"/bin/nothing"}}), w.podFile)
	if r := w.try("start", id); r.code == 0 || !strings.Contains(r.errs, "/bin/nothing") || !strings.Contains(r.errs, "crun create") {
		t.Errorf("start of a program that is not there: exit code %d, %s", r.code, r.errs)
	}
	w.crictl("rm", id)
}

// stateOf is the directory in which crun keeps a container.
func (n *node) stateOf(id string) string { return filepath.Join(n.runtimeDir(), "keeper", "oci", id) }

func (w *handlerWalk) execute(t *testing.T) {
	if out := w.exec(w.server, "sh", "-c", "echo $FROM_IMAGE $FROM_POD; hostname; pwd; id -u"); out != "yes yes\nhandled\n/www\n0" {
		t.Errorf("exec: %q", out)
	}
	for _, mode := range []string{"--sync=false", "--sync=true"} {
		r := w.try("exec", mode, w.server, "sh", "-c", "echo told >&2; exit 3")
		if r.code == 0 || !strings.Contains(r.errs, "told") || !strings.Contains(r.errs, "3") {
			t.Errorf("exec %s of a command that ends with 3: exit code %d, %q, %q", mode, r.code, r.out, r.errs)
		}
	}
	if r := w.try("exec", "--sync", "--timeout", "1", w.server, "sleep", "31"); r.code == 0 {
		t.Error("an exec over its time ended well")
	}
	eventually(t, 5*time.Second, "the exec over its time is killed", func() error {
		if ps := w.exec(w.server, "ps"); strings.Contains(ps, "sleep 31") {
			return fmt.Errorf("ps shows:\n%s", ps)
		}
		return nil
	})
	term := newTerminal(t, w.crictlCommand("exec", "-it", w.server, "/bin/sh"), 31, 97)
	term.await(`[#$] `)
	term.typeIn("echo size $(stty size)\n")
	term.await(`size 31 97`)
	term.resize(42, 123)
	eventually(t, 10*time.Second, "the new size is seen inside", func() error {
		term.typeIn("echo now $(stty size)\n")
		if got := term.await(`now \d+ \d+`); got != "now 42 123" {
			return fmt.Errorf("stty says %q", got)
		}
		return nil
	})
	term.typeIn("exit 5\n")
	if code := term.exitCode(); code == 0 {
		t.Errorf("crictl exec -it of a shell that ends with 5: exit code %d\n%s", code, term.text())
	}
}

func (w *handlerWalk) logs(t *testing.T) {
	id := w.start(w.pod, w.podFile, "counts", w.image, shell("seq 1 3; echo to stderr >&2; exit 4"))
	eventually(t, 5*time.Second, "the container has ended", func() error {
		if status := w.inspect("inspect", id); status.text("state") != "CONTAINER_EXITED" || status.text("exitCode") != "4" {
			return fmt.Errorf("state %s, exit code %s", status.text("state"), status.text("exitCode"))
		}
		return nil
	})
	if r := w.try("logs", id); r.out != "1\n2\n3\n" || r.errs != "to stderr\n" {
		t.Errorf("crictl logs: %q, %q", r.out, r.errs)
	}
}

func (w *handlerWalk) daemonKilled(t *testing.T) {
	flag := w.mkdir("work", "flag")
	w.writeAt(flag+"/wait", "")
	ends := w.start(w.pod, w.podFile, "ends", w.image, shell("while [ -e /flag/wait ]; do usleep 2000; done; echo last words; exit 7").
		with("mounts", []object{{"host_path": flag, "container_path": "/flag"}}))
	began := w.exec(w.server, "sh", "-c", "cut -d' ' -f22 /proc/1/stat")
	old := w.daemon()
	signal(t, old, syscall.SIGKILL)
	if err := os.Remove(flag + "/wait"); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "exec works again", func() error {
		if r := w.try("exec", w.server, "echo", "alive"); !strings.Contains(r.out, "alive") {
			return fmt.Errorf("%s", r.errs)
		}
		return nil
	})
	if now := w.exec(w.server, "sh", "-c", "cut -d' ' -f22 /proc/1/stat"); now != began {
		t.Errorf("the container was started anew: %s, %s", began, now)
	}
	if status := w.inspect("inspect", ends); status.text("exitCode") != "7" || status.text("state") != "CONTAINER_EXITED" {
		t.Errorf("the container that ended meanwhile: state %s, exit code %s", status.text("state"), status.text("exitCode"))
	}
	if log := w.crictl("logs", ends); log != "last words" {
		t.Errorf("its log: %q", log)
	}
}

func (w *handlerWalk) remove(t *testing.T) {
	traps := w.start(w.pod, w.podFile, "traps", w.image, shell("trap 'exit 9' TERM; echo ready; while :; do usleep 10000; done"))
	eventually(t, 5*time.Second, "the trap is set", func() error {
		if log := w.crictl("logs", traps); log != "ready" {
			return fmt.Errorf("the log is %q", log)
		}
		return nil
	})
	w.crictl("stop", "--timeout", "10", traps)
	if status := w.inspect("inspect", traps); status.text("exitCode") != "9" {
		t.Errorf("after crictl stop: exit code %s", status.text("exitCode"))
	}
	w.crictl("rm", traps)
	if _, err := os.Stat(w.stateOf(traps)); !os.IsNotExist(err) {
		t.Errorf("crun's state of a removed container: %v", err)
	}
	w.crictl("stopp", w.pod) // with the server running
	w.crictl("rmp", w.pod)
	for _, l := range append(glob(t, w.dataDir(), "pods/*", "containers/*", "images/rootfs/*"),
		glob(t, w.runtimeDir(), "keeper/bundles/*", "keeper/oci/*", "keeper/t*")...) {
		t.Errorf("left behind by rmp: %s", l)
	}
}
