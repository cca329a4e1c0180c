package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coracle-cri/coracle/e2e/box"
)

// expectRefusal asks a node to start where it cannot: the answer is to be one line with the cause and the command
// that mends it, and an exit code that is not 0.
func expectRefusal(t *testing.T, h *home, env []string, cause, fix string) {
	t.Helper()
	for _, args := range [][]string{{"up"}, {"up", "--detach"}} {
		r := h.command(env, filepath.Join(binDir, "coracle"), args...)
		lines := strings.Split(strings.TrimSpace(r.errs), "\n")
		sentence, command, found := strings.Cut(lines[0], "run: ")
		if r.code == 0 || len(lines) != 1 || !found || !strings.Contains(sentence, cause) || !strings.Contains(command, fix) {
			t.Errorf("coracle %s: exit code %d; want one line with %q and after \"run: \" %q, got:\n%s%s", strings.Join(args, " "), r.code, cause, fix, r.out, r.errs)
		}
	}
	left := glob(t, h.dir, "run/*/*")
	if len(left) > 0 {
		t.Errorf("the refusal left %v", left)
	}
}

func TestRefusalWithoutRuntimeDir(t *testing.T) {
	h := newHome(t)
	h.env = without(h.env, "XDG_RUNTIME_DIR")
	expectRefusal(t, h, nil, "XDG_RUNTIME_DIR", "export XDG_RUNTIME_DIR=")
}

func without(env []string, name string) []string {
	var out []string
	for _, v := range env {
		if !strings.HasPrefix(v, name+"=") {
			out = append(out, v)
		}
	}
	return out
}

func TestRefusalWithUnusableRuntimeDir(t *testing.T) {
	h := newHome(t)
	expectRefusal(t, h, []string{"XDG_RUNTIME_DIR=" + h.path("absent")}, h.path("absent"), "XDG_RUNTIME_DIR=")
	long := h.mkdir("run", strings.Repeat("long", 25))
	expectRefusal(t, h, []string{"XDG_RUNTIME_DIR=" + long}, "too long", "XDG_RUNTIME_DIR=")
}

func TestRefusalWithoutWritableHome(t *testing.T) {
	h := newHome(t)
	if err := os.Chmod(h.path("home"), 0o500); err != nil {
		t.Fatal(err)
	}
	h.env = without(h.env, "XDG_DATA_HOME")
	expectRefusal(t, h, nil, h.path("home"), "XDG_DATA_HOME=")
}

// TestRefusalWithoutPrograms hides one program at a time from PATH.
func TestRefusalWithoutPrograms(t *testing.T) {
	for program, want := range map[string][2]string{
		"newuidmap": {"newuidmap", "uidmap"}, "newgidmap": {"newgidmap", "uidmap"}, "slirp4netns": {"slirp4netns", "slirp4netns"}, "ip": {"ip", "iproute2"},
	} {
		t.Run(program, func(t *testing.T) {
			h := newHome(t)
			dir := h.mkdir("bin")
			for _, p := range []string{"newuidmap", "newgidmap", "getsubids", "slirp4netns", "ip", "nsenter", "sh"} {
				path, err := exec.LookPath(p)
				if p == program || err != nil {
					continue
				}
				if err := os.Symlink(path, filepath.Join(dir, p)); err != nil {
					t.Fatal(err)
				}
			}
			h.env = without(h.env, "PATH")
			expectRefusal(t, h, []string{"PATH=" + dir}, want[0], want[1])
		})
	}
}

func TestRefusalWithoutSubIDs(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{NoSubIDs: true})
		return
	}
	expectRefusal(t, newHome(t), nil, "/etc/subuid has no range for", "usermod --add-subuids")
}

func TestRefusalWithoutTun(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{NoTun: true})
		return
	}
	expectRefusal(t, newHome(t), nil, "/dev/net/tun", "/dev/net/tun")
}

func TestRefusalWithoutUserNamespaces(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{NoUserns: true})
		return
	}
	expectRefusal(t, newHome(t), nil, "user.max_user_namespaces", "sysctl -w user.max_user_namespaces=")
}

func TestRefusalUnderNoNewPrivs(t *testing.T) {
	h := newHome(t)
	r := h.command(nil, "setpriv", "--no-new-privs", filepath.Join(binDir, "coracle"), "up")
	if r.code == 0 || !strings.Contains(r.errs, "no_new_privs") {
		t.Errorf("exit code %d: %s", r.code, r.errs)
	}
}

// TestDoctorSaysAllAtOnce: doctor lists what is wrong and what is right, and its exit code says whether a node can be.
func TestDoctorSaysAllAtOnce(t *testing.T) {
	h := newHome(t)
	if r := h.coracle("doctor"); r.code != 0 || strings.Contains(r.out, "FAIL") {
		t.Errorf("coracle doctor: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	h.env = without(without(h.env, "XDG_RUNTIME_DIR"), "PATH")
	if r := h.command([]string{"PATH=/nonexistent"}, filepath.Join(binDir, "coracle"), "doctor"); r.code == 0 || strings.Count(r.out, "FAIL") < 2 {
		t.Errorf("coracle doctor on a poor host: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
}

// TestRefusalWithRuntimeDirOpenToOthers: who may write the directory may put other sockets in place of the node's.
func TestRefusalWithRuntimeDirOpenToOthers(t *testing.T) {
	h := newHome(t)
	dir := h.mkdir("open")
	h.env = without(h.env, "XDG_RUNTIME_DIR")
	for mode, refused := range map[os.FileMode]bool{0o777: true, 0o777 | os.ModeSticky: false, 0o700: false, 0o775: false} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		r := h.command([]string{"XDG_RUNTIME_DIR=" + dir}, filepath.Join(binDir, "coracle"), "doctor")
		if told := r.code != 0 && strings.Contains(r.out, "everybody may put something else"); told != refused {
			t.Errorf("mode %s: exit code %d\n%s", mode, r.code, r.out)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	expectRefusal(t, h, []string{"XDG_RUNTIME_DIR=" + dir}, "everybody may put something else", "XDG_RUNTIME_DIR")
}

// TestDoctorTellsOfTheHostsLoopback, which pods in the node's network reach where a program's descriptors are kept from its
// parent: some hosts keep all, this one those of a program that the user may not read.
func TestDoctorTellsOfTheHostsLoopback(t *testing.T) {
	h := newHome(t)
	if r := h.coracle("doctor"); r.code != 0 || strings.Contains(r.out, "127.0.0.1") {
		t.Errorf("where a node's network can be filtered: %s", r.out)
	}
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(cat)
	if err != nil {
		t.Fatal(err)
	}
	dir := h.mkdir("kept")
	if err := os.WriteFile(filepath.Join(dir, "cat"), raw, 0o111); err != nil {
		t.Fatal(err)
	}
	h.env[0] = strings.Replace(h.env[0], "PATH=", "PATH="+dir+":", 1)
	if r := h.coracle("doctor"); r.code != 0 || !strings.Contains(r.out, "note  pods in the node's network (hostNetwork) can reach this host's 127.0.0.1") || !strings.Contains(r.out, "pidfd_getfd") {
		t.Errorf("where it cannot: exit code %d\n%s", r.code, r.out)
	}
	if r := h.coracle("doctor", "--host-loopback"); r.code != 0 || strings.Contains(r.out, "127.0.0.1") {
		t.Errorf("where they are to reach it: %s", r.out)
	}
}

// TestConfiguration: a file's values are used, flags and variables go before it, and what it does not know is refused.
func TestConfiguration(t *testing.T) {
	h := newHome(t)
	for text, want := range map[string]string{
		"netwrok:\n  mtu: 1500\n":     "netwrok",
		"network:\n  mut: 1500\n":     "mut",
		"limits: sometimes\n":         "sometimes",
		"network:\n  mtu: [1, 2]\n":   "mtu",
		"registries:\n  a:\n    x: 1": "x",
	} {
		r := h.coracle("up", "--config", h.write("bad.yaml", text))
		if r.code == 0 || !strings.Contains(r.errs, want) || strings.Count(strings.TrimSpace(r.errs), "\n") > 0 {
			t.Errorf("configuration %q: exit code %d, %s", text, r.code, r.errs)
		}
	}
	if r := h.coracle("up", "--config", h.path("absent.yaml")); r.code == 0 || !strings.Contains(r.errs, "absent.yaml") {
		t.Errorf("a configuration file that is not there: exit code %d, %s", r.code, r.errs)
	}
	if r := h.coracle("up", "--no-such-flag"); r.code == 0 || !strings.Contains(r.errs, "no-such-flag") {
		t.Errorf("an unknown flag: exit code %d, %s", r.code, r.errs)
	}
	if r := h.coracle("up", "--name", "Not/A/Name"); r.code == 0 || !strings.Contains(r.errs, "Not/A/Name") {
		t.Errorf("an impossible name: exit code %d, %s", r.code, r.errs)
	}

	file := h.write("good.yaml", "name: fromfile\nnetwork:\n  mtu: 9000\n  podCIDR: 10.99.0.0/24\nlog:\n  format: json\n")
	n := h.up("fromfile", "--config", file)
	r := n.coracle("enter", "--name", "fromfile", "--", "ip", "-o", "address", "show")
	if !strings.Contains(r.out, "inet 10.99.0.") {
		t.Errorf("the bridge does not have the file's network:\n%s%s", r.out, r.errs)
	}
	if r := n.coracle("enter", "--name", "fromfile", "--", "ip", "-o", "link", "show", "coracle0"); !strings.Contains(r.out, "mtu 9000") {
		t.Errorf("the bridge does not have the file's MTU:\n%s%s", r.out, r.errs)
	}
	if !strings.Contains(n.logged(), `"msg":`) {
		t.Errorf("the log is not JSON:\n%s", tail(n.logged(), 3))
	}
}
