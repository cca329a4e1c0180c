package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// How critest is run. CORACLE_E2E_CRITEST is the directory of critest, ginkgo (which critest executes to run specs in
// parallel) and guest (what its images are made of), CORACLE_E2E_CRITEST_REPORT one for what a reader may want
// afterwards: critest's log, its report, and a summary. The others narrow or shape the run.
var (
	critestDir      = os.Getenv("CORACLE_E2E_CRITEST")
	critestReport   = os.Getenv("CORACLE_E2E_CRITEST_REPORT")
	critestFocus    = os.Getenv("CORACLE_E2E_CRITEST_FOCUS")    // a regular expression; "" = every spec
	critestParallel = os.Getenv("CORACLE_E2E_CRITEST_PARALLEL") // a number of processes; "" = one
	critestSeed     = os.Getenv("CORACLE_E2E_CRITEST_SEED")     // of the order of specs; "" = another one each time
	critestArgs     = os.Getenv("CORACLE_E2E_CRITEST_ARGS")     // more flags, as in "-websocket-exec -websocket-attach"
	critestRace     = os.Getenv("CORACLE_E2E_CRITEST_RACE")     // set = the programs have the race detector
)

// critestTimeout is for the whole run. It takes about a minute where nothing else runs and the machine is not emulated.
var critestTimeout = map[bool]time.Duration{false: 30 * time.Minute, true: 110 * time.Minute}[vmMode != ""]

// TestCritest runs critest as its module has it, but for one digest (see e2e/repin), inside the node's namespaces and
// as the same user. Its images come from a loopback registry under the names that they have for everybody, by a
// mirror of every registry. It fails where a spec does, where one is skipped for a reason that this machine does not
// give, and where anything of the run is left in the node.
func TestCritest(t *testing.T) {
	if critestDir == "" {
		t.Skip("CORACLE_E2E_CRITEST does not name the directory of critest; to run it: make critest")
	}
	registry := newRegistry(t, fixture.RegistryOptions{})
	if err := fixture.PushCritest(context.Background(), registry, filepath.Join(critestDir, "guest")); err != nil {
		t.Fatal(err)
	}
	h := newHome(t)
	h.writeAt(filepath.Join(h.mkdir("config", "coracle"), "config.yaml"), `registries: {"*": {mirrors: ["http://`+registry.Addr+`"]}}`+"\n")
	races := h.path("race")
	if critestRace != "" {
		// The detector would sleep for a second at each exit, in which a signal ends a process untidily.
		h.env = append(h.env, "GORACE=atexit_sleep_ms=0 log_path="+races)
	}
	n := h.up("default")
	before := n.inventory()
	omit := n.omissions()
	report := n.critest(critestRun{name: "critest", endpoint: n.endpoint, focus: critestFocus, omit: omit})
	result := judge(report, omit, n.excuses())
	n.refusals(&result)
	summary := result.summary()
	if err := os.WriteFile(filepath.Join(critestReport, "summary"), []byte(summary), 0o600); err != nil {
		t.Error(err)
	}
	t.Logf("seed %d\n%s", report.SuiteConfig.RandomSeed, summary)
	for _, f := range result.failed {
		t.Errorf("critest: %s\n%s", f.name(), f.why())
	}
	for _, s := range result.skipped {
		if !s.excused {
			t.Errorf("critest skipped a spec for a reason that this machine does not give: %s: %s", s.name, s.reason)
		}
	}
	if len(result.passed) == 0 || report.ended != nil && len(result.failed) == 0 {
		t.Errorf("%d specs have passed and none has failed, and critest ended with: %v", len(result.passed), report.ended)
	}
	n.expectAsBefore(before)
	t.Logf("critest itself has left, in its temporary directory and in the node's IPC namespace: %s", strings.Join(n.litter(), "; "))
	n.down()
	for _, found := range glob(t, h.dir, "race.*") {
		raw, err := os.ReadFile(strings.TrimPrefix(found, "file "))
		t.Errorf("the race detector reports:\n%s%v", raw, err)
	}
}

// critestRun is one run of the program.
type critestRun struct {
	name     string // of its directory, its log and its report
	endpoint string // of the RuntimeService; images are always the node's own
	focus    string // a regular expression; "" = every spec
	omit     []omission
}

// critest runs it to its end and returns what it reports.
func (n *node) critest(r critestRun) suiteReport {
	n.t.Helper()
	// What critest makes in its temporary directory is to be found, and to be gone with the home.
	work := n.mkdir(r.name)
	log, err := os.Create(filepath.Join(critestReport, r.name+".log"))
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.t.Logf("critest runs; its log is %s", log.Name())
	args := append([]string{"enter"}, n.args...)
	args = append(args, "--", "env", "TMPDIR="+work, "PATH="+critestDir+":/usr/sbin:/usr/bin:/sbin:/bin",
		filepath.Join(critestDir, "critest"), "-runtime-endpoint="+r.endpoint, "-image-endpoint="+n.endpoint,
		"-ginkgo.v", "-ginkgo.no-color", "-ginkgo.json-report=report.json")
	for _, o := range r.omit {
		args = append(args, "-ginkgo.skip="+o.pattern)
	}
	for flag, value := range map[string]string{"ginkgo.focus": r.focus, "parallel": critestParallel, "ginkgo.seed": critestSeed} {
		if value != "" {
			args = append(args, "-"+flag+"="+value)
		}
	}
	args = append(args, strings.Fields(critestArgs)...)
	ctx, cancel := context.WithTimeout(context.Background(), critestTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "coracle"), args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = n.env, work, log, log
	cmd.WaitDelay = 5 * time.Second
	ended := cmd.Run()
	if ctx.Err() != nil {
		n.t.Fatalf("critest did not end within %s", critestTimeout)
	}
	// With more than one process ginkgo puts the report beside the name that it runs critest by.
	found, err := filepath.Glob(filepath.Join(work, "cri-test*", "report.json"))
	if err != nil {
		n.t.Fatal(err)
	}
	found = append(found, filepath.Join(work, "report.json"))
	report, err := readReport(found[0])
	if err != nil {
		raw, _ := os.ReadFile(log.Name())
		n.t.Fatalf("critest has left no report: %v (it ended with: %v)\n%s", err, ended, tail(string(raw), 40))
	}
	if raw, err := os.ReadFile(found[0]); err == nil {
		if err := os.WriteFile(filepath.Join(critestReport, r.name+".json"), raw, 0o600); err != nil {
			n.t.Error(err)
		}
	}
	report.ended = ended
	return report
}

// omission is a spec that critest is told to leave out, and why this machine cannot run it.
type omission struct {
	pattern, reason string
}

// omissions asks the kernel, not the runtime, what there is.
func (n *node) omissions() []omission {
	n.t.Helper()
	var out []omission
	switch {
	case !n.hasController("memory"):
		out = append(out, omission{"Container OOM", "the memory controller is not in force in the node's cgroup: the kernel enforces no memory limit"})
	case critestRace != "":
		out = append(out, omission{"Container OOM", "a keeper with the race detector does not fit into the 15 MiB of the spec's container, which it starts"})
	}
	if appArmor() {
		out = append(out, omission{"AppArmor", "the specs load profiles into the kernel (sudo apparmor_parser), which is root's to do and not that of a node's user"})
	}
	return out
}

// hasController tells whether the kernel has a controller for the pods' cgroups, where there are any.
func (n *node) hasController(name string) bool {
	n.t.Helper()
	controllers := n.inside("sh", "-c", "cat /sys/fs/cgroup/pods/cgroup.controllers || true")
	return slices.Contains(strings.Fields(controllers), name)
}

// excuses are the reasons that critest itself may have to skip a spec here, as regular expressions.
func (n *node) excuses() []*regexp.Regexp {
	n.t.Helper()
	var out []*regexp.Regexp
	excuse := func(pattern string) { out = append(out, regexp.MustCompile(pattern)) }
	if !appArmor() {
		excuse(`^AppArmor is disabled on this host$`)
	}
	if !n.supportsUserNamespaces() {
		excuse(usernsReason)
	}
	// critest tries this out by itself, in the node.
	excuse(`^ID mapping is not supported with path`)
	return out
}

// appArmor tells whether the kernel has it on, from the file that critest reads, too.
func appArmor() bool {
	raw, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(raw), "Y")
}

// inside runs a command in the node's namespaces and returns what it printed.
func (n *node) inside(command ...string) string {
	n.t.Helper()
	r := n.coracle(append(append([]string{"enter"}, n.args...), append([]string{"--"}, command...)...)...)
	if r.code != 0 {
		n.t.Fatalf("coracle enter -- %s: exit code %d\n%s%s", strings.Join(command, " "), r.code, r.out, r.errs)
	}
	return r.out
}

// inventory lists what a pod could leave in the node: pods and containers, their records and file systems, mounts,
// network interfaces and shared memory, and on the host processes, cgroups and listening sockets. Images, which critest
// keeps, are no part of it.
func (n *node) inventory() []string {
	n.t.Helper()
	var out []string
	add := func(what string, things ...string) {
		for _, x := range things {
			out = append(out, what+" "+x)
		}
	}
	add("pod", strings.Fields(n.crictl("pods", "-q"))...)
	add("container", strings.Fields(n.crictl("ps", "-a", "-q"))...)
	add("", glob(n.t, n.dataDir(), "pods/*", "containers/*", "images/rootfs/*", "images/volumes/*", "images/tmp/*", "images/corrupt/*")...)
	for line := range strings.Lines(n.inside("cat", "/proc/self/mountinfo")) {
		if f := strings.Fields(line); len(f) > 4 {
			add("mount on", f[4])
		}
	}
	for line := range strings.Lines(n.inside("cat", "/proc/net/dev")) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			add("interface", strings.TrimSpace(name))
		}
	}
	w := observe()
	add("cgroup", w.cgroups...)
	add("listening socket", w.listening...)
	add("file", w.tmp...)
	for pid, start := range n.trace().pids {
		if _, now, ok := stat(pid); ok && now == start {
			add("process", describe(pid))
		}
	}
	return out
}

// expectAsBefore fails the test where the node has anything that it did not have. Namespaces and interfaces of pods
// that are gone may take the kernel a moment.
func (n *node) expectAsBefore(before []string) {
	n.t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		left = slices.DeleteFunc(n.inventory(), func(x string) bool { return slices.Contains(before, x) })
		if len(left) == 0 {
			return
		}
	}
	for _, l := range left {
		n.t.Errorf("left in the node by the run: %s", l)
	}
}

// litter lists what critest's own process has left and coracle knows nothing of. It goes with the home and the node.
func (n *node) litter() []string {
	n.t.Helper()
	out := append(glob(n.t, n.path("critest"), "*"), glob(n.t, n.path("critest-userns"), "*")...)
	for i, line := range slices.Collect(strings.Lines(n.inside("cat", "/proc/sysvipc/shm"))) {
		if f := strings.Fields(line); i > 0 && len(f) > 3 {
			out = append(out, "shared memory segment "+f[1]+" of "+f[3]+" bytes")
		}
	}
	return out
}

// supportsUserNamespaces is the word of the runtime's Status on its default handler.
func (n *node) supportsUserNamespaces() bool {
	n.t.Helper()
	var info struct {
		RuntimeHandlers []struct {
			Name     string
			Features struct {
				UserNamespaces bool `json:"user_namespaces"`
			}
		}
	}
	raw := n.crictl("info")
	if err := json.Unmarshal([]byte(raw), &info); err != nil {
		n.t.Fatal(err)
	}
	for _, handler := range info.RuntimeHandlers {
		if handler.Name == "" {
			return handler.Features.UserNamespaces
		}
	}
	n.t.Error("Status lists no default handler")
	return false
}
