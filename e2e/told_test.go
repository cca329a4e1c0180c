package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// told is the command in a text of coracle's that begins with these words; it ends with the line or at a backtick.
func told(t *testing.T, text, begin string) string {
	t.Helper()
	_, rest, found := strings.Cut(text, begin)
	if !found {
		t.Fatalf("coracle does not tell to run %q:\n%s", begin, text)
	}
	end := strings.IndexAny(rest, "`\n")
	if end < 0 {
		end = len(rest)
	}
	return begin + rest[:end]
}

// shell runs a command as its user would, who has been told to.
func (h *home) shell(command string) {
	h.t.Helper()
	r := h.command(nil, "sh", "-c", command)
	h.t.Logf("$ %s\n%s%s", command, r.out, r.errs)
	if r.code != 0 {
		h.t.Fatalf("exit code %d", r.code)
	}
}

// undo is a command for the end of the test, which leaves the machine as it was.
func (h *home) undo(command string) {
	h.t.Cleanup(func() {
		if r := h.command(nil, "sh", "-c", command); r.code != 0 {
			h.t.Errorf("%s: %s%s", command, r.out, r.errs)
		}
	})
}

// statusOf starts a node, asks it for its status and takes it down.
func (h *home) statusOf() (status string, controllers []string) {
	h.t.Helper()
	n := h.up("default")
	status = n.coracle("status", "--verbose").out
	controllers = strings.Fields(n.inside("sh", "-c", "cat /sys/fs/cgroup/pods/cgroup.controllers || true"))
	n.down()
	return status, controllers
}

func (h *home) expectControllers(what string, want []string) (status string) {
	h.t.Helper()
	status, got := h.statusOf()
	h.t.Logf("%s: controllers %q", what, got)
	for _, c := range want {
		if !slices.Contains(got, c) {
			h.t.Errorf("%s: the node has the controllers %q, want %q\n%s", what, got, want, status)
			break
		}
	}
	return status
}

// TestDelegationTold does what coracle tells its user to do, in each mode of the VM, and looks whether it is true.
func TestDelegationTold(t *testing.T) {
	inVM(t)
	h := newHome(t)
	switch vmMode {
	case "full":
		toldToLinger(h)
	case "memory":
		toldTheDropIn(h)
	case "plain":
		toldAUnit(h)
		toldToStartSystemd(h)
	case "service":
		if status, _ := h.statusOf(); strings.Contains(status, "sudo ") {
			t.Errorf("nothing is missing, and coracle tells to run something:\n%s", status)
		}
	}
}

const enableLinger = "sudo loginctl enable-linger tester"

// toldToLinger: a node that would end with the session says so, until it does not.
func toldToLinger(h *home) {
	h.shell("sudo loginctl disable-linger tester")
	h.undo(enableLinger)
	before := h.expectControllers("without lingering", allControllers)
	h.shell(told(h.t, before, enableLinger))
	if after := h.expectControllers("with lingering", allControllers); strings.Contains(after, "enable-linger") {
		h.t.Errorf("it lingers, and coracle still tells to make it:\n%s", after)
	}
}

// toldTheDropIn: systemd is told to delegate every controller.
func toldTheDropIn(h *home) {
	before, _ := h.statusOf()
	h.undo("sudo rm -f /etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload && sudo systemctl restart user@1000.service")
	h.shell(told(h.t, before, "sudo mkdir -p /etc/systemd/system/user@.service.d"))
	// The user of the VM lingers. For others it is logging out of the last session that ends their systemd.
	h.shell(told(h.t, before, "sudo systemctl restart user@1000.service"))
	if after := h.expectControllers("with the drop-in", allControllers); strings.Contains(after, "sudo ") {
		h.t.Errorf("nothing is missing, and coracle tells to run something:\n%s", after)
	}
}

// toldAUnit: root starts the node in a unit that delegates.
func toldAUnit(h *home) {
	before, _ := h.statusOf()
	h.shell(told(h.t, before, "sudo systemd-run --uid=tester -p Delegate=yes"))
	// The unit knows of HOME, PATH and XDG_RUNTIME_DIR, and of no other variable of this test's.
	env := []string{"XDG_DATA_HOME=", "XDG_CONFIG_HOME="}
	coracle := func(args ...string) result { return h.command(env, binDir+"/coracle", args...) }
	eventually(h.t, upTimeout, "the node in the unit is up", func() error {
		if r := coracle("status", "--verbose"); r.code != 0 || !strings.Contains(r.out, "yes:") {
			return fmt.Errorf("coracle status: %s%s", r.out, r.errs)
		}
		return nil
	})
	status := coracle("status", "--verbose").out
	h.t.Logf("the node in the unit:\n%s", status)
	if got := strings.Fields(coracle("enter", "--", "cat", "/sys/fs/cgroup/pods/cgroup.controllers").out); !slices.Equal(slices.Sorted(slices.Values(got)), allControllers) {
		h.t.Errorf("the node in a unit that delegates has the controllers %q", got)
	}
	if r := coracle("down"); r.code != 0 {
		h.t.Errorf("coracle down: %s%s", r.out, r.errs)
	}
}

// toldToStartSystemd: a systemd of the user's gives the node what the distribution delegates.
func toldToStartSystemd(h *home) {
	before, _ := h.statusOf()
	h.undo("sudo loginctl disable-linger tester; sudo systemctl stop user@1000.service")
	h.shell(told(h.t, before, enableLinger))
	eventually(h.t, time.Minute, "the user's bus is there", func() error {
		_, err := os.Stat("/run/user/1000/bus")
		return err
	})
	h.expectControllers("with a systemd of the user's", []string{"memory", "pids"})
}
