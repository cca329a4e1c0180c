package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// vmMode is the mode of the test VM (scripts/vm.sh) that the tests run in; "" = not in one.
var vmMode = os.Getenv("CORACLE_E2E_VM")

// allControllers are what the CRI's resources need.
var allControllers = []string{"cpu", "cpuset", "io", "memory", "pids"}

// controllersOf are what a node has in each mode.
var controllersOf = map[string][]string{"full": allControllers, "service": allControllers, "memory": {"memory", "pids"}, "plain": nil}

// inVM skips a test of what only the VM is known to have, and where it lacks a controller by its mode.
func inVM(t *testing.T, controllers ...string) {
	t.Helper()
	have, known := controllersOf[vmMode]
	if !known {
		t.Skip("CORACLE_E2E_VM names no mode of the test VM; to run it: make e2e-vm")
	}
	for _, c := range controllers {
		if !slices.Contains(have, c) {
			t.Skipf("in mode %s of the VM nobody has the controller %s", vmMode, c)
		}
	}
}

// onHybrid tells whether cgroup v1 holds the controllers of this machine.
func onHybrid() bool {
	raw, err := os.ReadFile("/proc/self/cgroup")
	return err == nil && strings.Contains(string(raw), ":memory:")
}

// TestDelegation: what is in force, where it was looked for and what to run for the rest is told, and true.
func TestDelegation(t *testing.T) {
	n := newHome(t).up("default")
	status := n.coracle("status", "--verbose")
	doctor := n.coracle("doctor")
	t.Logf("coracle status --verbose:\n%s\ncoracle doctor:\n%s", status.out, doctor.out)
	want := []string{"cgroup, tried 1  subtree of this process: ", "cgroup, tried 2  scope of the user's systemd: "}
	unwanted := []string{}
	const dropIn, asRoot = "sudo tee /etc/systemd/system/user@.service.d/delegate.conf", "sudo systemd-run --uid=tester -p Delegate=yes"
	switch {
	case vmMode == "full":
		want = append(want, "may not write", "/user@1000.service/app.slice/coracle-default-", "ResourceLimits", "yes:")
		unwanted = append(unwanted, dropIn, asRoot)
	case vmMode == "memory":
		want = append(want, "with controllers memory pids", "cpu cpuset io: not delegated by systemd", dropIn)
	case vmMode == "plain":
		want = append(want, "no cgroups", "sudo loginctl enable-linger tester", asRoot, "/run/user/1000/bus")
	case vmMode == "service":
		want = append(want, "/system.slice/coracle-vm.service with controllers", "not asked for, since nothing is missing", "yes:")
		unwanted = append(unwanted, dropIn, asRoot)
	case onHybrid():
		want = append(want, "cgroup v1 on this machine", "systemd.unified_cgroup_hierarchy=1")
	}
	for _, w := range want {
		if !strings.Contains(status.out, w) {
			t.Errorf("coracle status --verbose does not say %q", w)
		}
	}
	for _, u := range unwanted {
		if strings.Contains(status.out, u) {
			t.Errorf("coracle status --verbose says %q, and nothing is missing", u)
		}
	}
	if expected, known := controllersOf[vmMode]; known {
		if n.logContains("root filesystems are copied") {
			t.Error("the kernel of the VM has overlayfs, and the node does not use it")
		}
		for _, c := range allControllers {
			if got := n.hasController(c); got != slices.Contains(expected, c) {
				t.Errorf("controller %s is there for pods: %v", c, got)
			}
		}
	}
	// What is started inside is the node's in every account, wherever its user's shell is.
	if in := n.inside("sh", "-c", "[ ! -d /sys/fs/cgroup/pods ] || cat /proc/self/cgroup"); in != "" && !strings.Contains(in, "0::/supervisor\n") {
		t.Errorf("a command inside the node is in the cgroup %q", in)
	}
	n.down()
}

// TestDelegationScopeEndsWithTheNode: nothing of a scope is left, however the node ends.
func TestDelegationScopeEndsWithTheNode(t *testing.T) {
	inVM(t, "memory")
	if vmMode == "service" {
		t.Skip("there the node is in the unit's own cgroup")
	}
	h := newHome(t)
	scopes := func() []string {
		found, err := filepath.Glob("/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/coracle-*.scope")
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	for _, end := range []struct {
		name string
		do   func(*node)
	}{{"down", func(n *node) { n.down() }}, {"kill", func(n *node) { n.kill() }}} {
		n := h.up("default")
		if got := scopes(); len(got) != 1 {
			t.Fatalf("scopes of a node that is up: %q, want one", got)
		}
		end.do(n)
		eventually(t, 20*time.Second, end.name+": the scope is gone", func() error {
			if got := scopes(); len(got) > 0 {
				return os.ErrExist
			}
			return nil
		})
		units := h.command([]string{"XDG_RUNTIME_DIR=/run/user/1000"}, "systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", "coracle-*")
		if units.code != 0 || strings.TrimSpace(units.out) != "" {
			t.Errorf("%s: units left: %s%s", end.name, units.out, units.errs)
		}
	}
	if r := h.coracle("down"); r.code != 0 {
		t.Errorf("coracle down: %s%s", r.out, r.errs)
	}
}
