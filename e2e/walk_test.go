package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// TestCrictlWalk does, in order, everything that crictl can do with one pod, as its user does from outside of the
// node's namespaces: pull, images, inspecti, runp, create, start, ps, exec, exec -it, attach, logs -f, port-forward,
// stop, rm, stopp, rmp, rmi.
func TestCrictlWalk(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	n := newHome(t).up("default")

	w := &walk{node: n, image: image}
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"version and info", w.version}, {"pull", w.pull}, {"run", w.run}, {"exec", w.execute}, {"exec in a terminal", w.execTerminal},
		{"attach", w.attach}, {"logs", w.logs}, {"port-forward", w.portForward}, {"enter", w.enter},
		{"stop and remove", w.remove},
	} {
		ok := t.Run(step.name, func(t *testing.T) {
			n.t = t
			step.do(t)
		})
		if n.t = t; !ok {
			t.Fatal("a later step needs this one")
		}
	}
	n.down()
}

// walk is what the steps hand on.
type walk struct {
	*node
	image, imageID       string
	pod, podFile, server string
}

func (w *walk) version(t *testing.T) {
	if out := w.crictl("version"); !strings.Contains(out, "RuntimeName:  coracle") || !regexp.MustCompile(`RuntimeApiVersion:\s+v1\b`).MatchString(out) {
		t.Errorf("crictl version:\n%s", out)
	}
	for _, condition := range []string{"RuntimeReady", "NetworkReady"} {
		if !w.condition(condition) {
			t.Errorf("crictl info: %s is not true:\n%s", condition, w.crictl("info"))
		}
	}
	if r := w.coracle("status"); r.code != 0 || !strings.Contains(r.out, w.endpoint) || !strings.Contains(r.out, "cgroup") {
		t.Errorf("coracle status: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
}

// condition is the truth of one condition of the CRI's Status.
func (n *node) condition(name string) bool {
	n.t.Helper()
	var info struct {
		Status struct {
			Conditions []struct {
				Type   string
				Status bool
			}
		}
	}
	if err := json.Unmarshal([]byte(n.crictl("info")), &info); err != nil {
		n.t.Fatal(err)
	}
	for _, c := range info.Status.Conditions {
		if c.Type == name {
			return c.Status
		}
	}
	n.t.Errorf("Status has no condition %s", name)
	return false
}

func (w *walk) pull(t *testing.T) {
	if r := w.try("pull", strings.Replace(w.image, ":1", ":absent", 1)); r.code == 0 || !strings.Contains(r.errs, "absent") {
		t.Errorf("pull of an absent tag: exit code %d: %s", r.code, r.errs)
	}
	w.crictl("pull", w.image)
	if out := w.crictl("images"); !regexp.MustCompile(`tests/busybox\s+1\s+[0-9a-f]{12,}\s+[0-9.]+[kM]B`).MatchString(out) {
		t.Errorf("crictl images:\n%s", out)
	}
	status := w.inspect("inspecti", w.image)
	w.imageID = status.text("id")
	if !strings.HasPrefix(w.imageID, "sha256:") {
		t.Errorf("image id %q", w.imageID)
	}
	if tags := fmt.Sprint(status.field("repoTags")); !strings.Contains(tags, w.image) {
		t.Errorf("tags %s, want %s", tags, w.image)
	}
	if byID := w.inspect("inspecti", w.imageID); byID.text("id") != w.imageID {
		t.Errorf("by id: %v", byID)
	}
	// The digest that the registry gave is a name too, and pulling by it fetches no layer again.
	digests, ok := status.field("repoDigests").([]any)
	if !ok || len(digests) == 0 {
		t.Fatalf("digests %v", status.field("repoDigests"))
	}
	w.crictl("pull", fmt.Sprint(digests[0]))
	if out := w.crictl("imagefsinfo"); !strings.Contains(out, "mountpoint") {
		t.Errorf("crictl imagefsinfo:\n%s", out)
	}
}

func (w *walk) run(t *testing.T) {
	w.pod, w.podFile = w.runPod("walk", nil)
	if r := w.try("runp", w.podFile); r.code == 0 {
		t.Error("a second pod of the same name, uid, namespace and attempt was run")
	}
	if out := w.crictl("pods"); !strings.Contains(out, w.pod[:13]) || !strings.Contains(out, "Ready") {
		t.Errorf("crictl pods:\n%s", out)
	}
	w.server = w.start(w.pod, w.podFile, "server", w.image, object{"envs": []object{{"key": "FROM_POD", "value": "yes"}}})
	out := w.crictl("ps")
	if !strings.Contains(out, w.server[:13]) || !strings.Contains(out, "Running") || !strings.Contains(out, "server") {
		t.Errorf("crictl ps:\n%s", out)
	}
	status := w.inspect("inspect", w.server)
	if status.text("state") != "CONTAINER_RUNNING" || status.text("imageId") != w.imageID || status.text("imageRef") == "" {
		t.Errorf("crictl inspect: %v", status)
	}
	if quiet := w.crictl("ps", "-q", "--pod", w.pod); quiet != w.server {
		t.Errorf("crictl ps -q --pod: %q", quiet)
	}
}

func (w *walk) execute(t *testing.T) {
	if out := w.exec(w.server, "sh", "-c", "echo $FROM_IMAGE $FROM_POD; hostname; pwd; id -u"); out != "yes yes\nwalk\n/www\n0" {
		t.Errorf("exec: %q", out)
	}
	w.addresses(t)
	if out := w.crictl("exec", "--sync", w.server, "cat", "/www/index.html"); !strings.Contains(out, "hello from a coracle") {
		t.Errorf("exec --sync: %q", out)
	}
	for _, mode := range []string{"--sync=false", "--sync=true"} {
		r := w.try("exec", mode, w.server, "sh", "-c", "echo told >&2; exit 3")
		if r.code == 0 || !strings.Contains(r.errs, "told") || !strings.Contains(r.errs, "3") {
			t.Errorf("exec %s of a command that ends with 3: exit code %d, %q, %q", mode, r.code, r.out, r.errs)
		}
	}
	// Standard input to its end, and the output whole: more than any pipe holds.
	const size = 4 << 20
	cmd := w.crictlCommand("exec", "-i", w.server, "cat")
	cmd.Stdin = io.LimitReader(zeros{}, size)
	out, err := cmd.Output()
	if err != nil || len(out) != size {
		t.Errorf("exec -i cat: %d bytes of %d came back, %v", len(out), size, err)
	}
	if r := w.try("exec", "--sync", "--timeout", "1", w.server, "sleep", "30"); r.code == 0 {
		t.Error("an exec over its time ended well")
	}
	eventually(t, 5*time.Second, "the exec over its time is killed", func() error {
		if ps := w.exec(w.server, "ps"); strings.Contains(ps, "sleep 30") {
			return fmt.Errorf("ps shows:\n%s", ps)
		}
		return nil
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '0'
	}
	return len(p), nil
}

func (w *walk) execTerminal(t *testing.T) {
	term := newTerminal(t, w.crictlCommand("exec", "-it", w.server, "/bin/sh"), 31, 97)
	term.await(`[#$] `)
	term.typeIn("tty; echo size $(stty size)\n")
	term.await(`/dev/pts/\d+`)
	term.await(`size 31 97`)
	term.resize(42, 123)
	eventually(t, 10*time.Second, "the new size is seen inside", func() error {
		term.typeIn("echo now $(stty size)\n")
		if got := term.await(`now \d+ \d+`); got != "now 42 123" {
			return fmt.Errorf("stty says %q", got)
		}
		return nil
	})
	term.typeIn("sleep 100\n")
	time.Sleep(200 * time.Millisecond)
	term.typeIn("\x03echo interrupted-$?\n")
	term.await(`interrupted-130`)
	term.typeIn("exit 5\n")
	if code := term.exitCode(); code == 0 {
		t.Errorf("crictl exec -it of a shell that ends with 5: exit code %d\n%s", code, term.text())
	}
}

func (w *walk) attach(t *testing.T) {
	id := w.start(w.pod, w.podFile, "asks", w.image, object{"stdin": true, "stdin_once": false, "tty": true,
		"command": []string{"/bin/sh", "-c", `while read -p 'name? ' name; do [ "$name" = end ] && exit 4; echo "hello, $name, $(stty size)"; done`}})
	term := newTerminal(t, w.crictlCommand("attach", "-it", id), 20, 70)
	time.Sleep(300 * time.Millisecond) // the prompt was written before anybody was attached
	term.typeIn("ann\n")
	term.await(`hello, ann, \d+ \d+`)
	term.resize(21, 71)
	eventually(t, 10*time.Second, "the new size is seen inside", func() error {
		term.typeIn("bob\n")
		if got := term.await(`hello, bob, \d+ \d+`); !strings.HasSuffix(got, "21 71") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
	term.typeIn("end\n")
	term.exitCode()
	eventually(t, 5*time.Second, "the container has ended", func() error {
		if status := w.inspect("inspect", id); status.text("exitCode") != "4" || status.text("state") != "CONTAINER_EXITED" {
			return fmt.Errorf("state %s, exit code %s", status.text("state"), status.text("exitCode"))
		}
		return nil
	})
	if logs := w.crictl("logs", id); !strings.Contains(logs, "hello, ann") {
		t.Errorf("what an attached terminal shows is not in the log:\n%s", logs)
	}

	// Without a terminal, the two streams stay apart.
	id = w.start(w.pod, w.podFile, "talks", w.image, shell("while :; do echo out; echo err >&2; sleep 0.1; done"))
	cmd := w.crictlCommand("attach", id)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "out\n" {
		t.Errorf("crictl attach: %q, %v", line, err)
	}
	w.crictl("stop", "--timeout", "0", id)
}

func (w *walk) logs(t *testing.T) {
	id := w.start(w.pod, w.podFile, "counts", w.image, shell("i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; printf unfinished; echo to stderr >&2"))
	began := time.Now()
	cmd := w.crictlCommand("logs", "-f", id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errOut := new(strings.Builder)
	cmd.Stderr = errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	var lines []string
	first := time.Duration(0)
	for s := bufio.NewScanner(out); s.Scan(); {
		if lines = append(lines, s.Text()); len(lines) == 1 {
			first = time.Since(began)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("crictl logs -f: %v %s", err, errOut)
	}
	if len(lines) != 31 || lines[0] != "line 1" || lines[29] != "line 30" || lines[30] != "unfinished" {
		t.Errorf("crictl logs -f printed %d lines:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	if whole := time.Since(began); first > whole/2 {
		t.Errorf("the first line came after %s of %s: it was not followed", first, whole)
	}
	if got := errOut.String(); !strings.Contains(got, "to stderr") {
		t.Errorf("crictl logs -f, standard error: %q", got)
	}
	raw, err := os.ReadFile(filepath.Join(w.path("work", "logs-default-walk"), "counts.log"))
	if err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d) (stdout|stderr) [FP] `)
	for line := range strings.Lines(string(raw)) {
		if !form.MatchString(line) {
			t.Errorf("log line %q is not in the CRI's format", line)
		}
	}
}

func (w *walk) portForward(t *testing.T) {
	cmd := w.crictlCommand("port-forward", w.pod, "0:8080")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	found := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindStringSubmatch(line)
	if found == nil {
		t.Fatalf("crictl port-forward: %q, %v", line, err)
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for range 5 {
		if body, err := get(&client, "http://127.0.0.1:"+found[1]+"/"); err != nil || body != "hello from a coracle\n" {
			t.Errorf("through the port-forward: %q, %v", body, err)
		}
	}
}

func get(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", resp.Status)
	}
	return string(body), err
}

// addresses: the pod has one of IPv4 and, where the kernel has IPv6, another; it finds both under its own name.
func (w *walk) addresses(t *testing.T) {
	network := w.inspect("inspectp", w.pod).field("network")
	ips := []string{w.podIP(w.pod)}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		more := regexp.MustCompile(`fd63:6f72:6163:6c65::[0-9a-f]+`).FindString(fmt.Sprint(network))
		if more == "" {
			t.Fatalf("the pod has no IPv6 address: %v", network)
		}
		ips = append(ips, more)
	}
	hosts := w.exec(w.server, "cat", "/etc/hosts")
	for _, ip := range ips {
		if !strings.Contains(hosts, ip+"\twalk") {
			t.Errorf("the pod's hosts file has no %s:\n%s", ip, hosts)
		}
		if out := w.exec(w.server, "wget", "-q", "-O", "-", "http://"+net.JoinHostPort(ip, "8080")+"/index.html"); !strings.Contains(out, "hello from a coracle") {
			t.Errorf("the pod's server answers at %s: %q", ip, out)
		}
	}
}

func (w *walk) enter(t *testing.T) {
	r := w.coracle("enter", "--", "sh", "-c", "id -u; cat /proc/self/net/dev; echo $CONTAINER_RUNTIME_ENDPOINT")
	if r.code != 0 || !strings.HasPrefix(r.out, "0\n") || !strings.Contains(r.out, "coracle0") || !strings.Contains(r.out, w.endpoint) {
		t.Errorf("coracle enter: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	if r := w.coracle("enter", "--", "sh", "-c", "exit 9"); r.code != 9 {
		t.Errorf("coracle enter of a command that ends with 9: exit code %d", r.code)
	}
	// A port-forward and an exec work from inside too, as a kubelet in the node needs them.
	r = w.command(w.crictlEnv(), filepath.Join(binDir, "coracle"), "enter", "--", crictlBin, "exec", w.server, "echo", "from inside")
	if r.code != 0 || !strings.Contains(r.out, "from inside") {
		t.Errorf("crictl exec inside the node: exit code %d: %s%s", r.code, r.out, r.errs)
	}
}

func (w *walk) remove(t *testing.T) {
	if r := w.try("rm", w.server); r.code == 0 {
		t.Error("crictl rm removed a container that runs")
	}
	w.crictl("stop", w.server)
	if status := w.inspect("inspect", w.server); status.text("state") != "CONTAINER_EXITED" || status.text("finishedAt") == "" {
		t.Errorf("after crictl stop: %v", status)
	}
	w.crictl("stop", w.server) // stopping is idempotent
	w.crictl("rm", w.server)
	if ids := strings.Fields(w.crictl("ps", "-a", "-q")); slices.Contains(ids, w.server) {
		t.Errorf("crictl ps -a shows a removed container: %v", ids)
	}
	w.crictl("stopp", w.pod)
	if state := w.inspect("inspectp", w.pod).text("state"); state != "SANDBOX_NOTREADY" {
		t.Errorf("after crictl stopp: %s", state)
	}
	w.crictl("rmp", w.pod)
	if out := w.crictl("pods", "-q"); out != "" {
		t.Errorf("crictl pods after rmp: %s", out)
	}
	if out := w.crictl("ps", "-a", "-q"); out != "" {
		t.Errorf("crictl ps -a after rmp: %s", out)
	}
	w.crictl("rmi", w.image)
	if out := w.crictl("images", "-q"); out != "" {
		t.Errorf("crictl images after rmi: %s", out)
	}
	for _, l := range glob(t, w.dataDir(), "pods/*", "containers/*", "images/rootfs/*") {
		t.Errorf("left behind by rmp: %s", l)
	}
}
