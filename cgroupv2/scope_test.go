package cgroupv2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeSystemd makes scopes in a machine's directory as a systemd of the user's session does: it makes the cgroup, gives it
// the manager's controllers, and the process is in it then.
type fakeSystemd struct {
	root, own   string
	controllers string
	refusal     error
	started     []string
	attached    []string
	closed      int
}

func (f *fakeSystemd) group(context.Context) (string, error) { return f.own, nil }
func (f *fakeSystemd) close()                                { f.closed++ }

func (f *fakeSystemd) attach(_ context.Context, unit, below string, pid int) error {
	f.attached = append(f.attached, fmt.Sprintf("%s %s %d", unit, below, pid))
	return f.refusal
}

func (f *fakeSystemd) startScope(_ context.Context, name, _ string, _ int) error {
	if f.refusal != nil {
		return f.refusal
	}
	f.started = append(f.started, name)
	rel := f.own + "/app.slice/" + name
	dir := filepath.Join(f.root, "/sys/fs/cgroup", rel)
	err := os.MkdirAll(dir, 0o755)
	for file, content := range map[string]string{"cgroup.controllers": f.controllers, procsFile: "4242\n", subtreeFile: "", "cgroup.type": "domain"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600))
	}
	return errors.Join(err, os.WriteFile(filepath.Join(f.root, "/proc/self/cgroup"), []byte("0::"+rel+"\n"), 0o600))
}

// session is an ssh session on a machine with systemd: a scope of logind's, which the user may not write.
func session(t *testing.T, controllers string) (host, *fakeSystemd) {
	t.Helper()
	m := machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/session-1.scope\n",
		files: map[string]string{"/run/systemd/system/": "", "/run/user/1000/systemd/": ""},
		groups: map[string]cgroup{
			"/sys/fs/cgroup": {controllers: all},
			"/sys/fs/cgroup/user.slice/user-1000.slice/session-1.scope": {controllers: "memory pids", procs: "4242\n"},
			userDir: {controllers: controllers, ours: true},
		}}
	h := m.build(t)
	fake := &fakeSystemd{root: h.root, own: "/user.slice/user-1000.slice/user@1000.service", controllers: controllers}
	denied := h.writable
	h.writable = func(path string) error {
		if strings.HasPrefix(path, filepath.Join(h.root, userDir)) {
			return nil
		}
		return denied(path)
	}
	h.user = "ann"
	h.dial = func(context.Context) (manager, error) { return fake, nil }
	return h, fake
}

func mustFind(t *testing.T, h host) Delegation {
	t.Helper()
	d, err := h.find()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestScopeOfTheUsersSystemd(t *testing.T) {
	h, fake := session(t, "cpuset cpu io memory pids")
	found := mustFind(t, h)
	if !found.Scope || found.Path != "" || len(fake.started) > 0 {
		t.Fatalf("%+v, started %v: Find only looks", found, fake.started)
	}
	got, err := h.obtain(found, "x")
	if err != nil {
		t.Fatal(err)
	}
	want := userDir + "/app.slice/coracle-x-4242.scope"
	if got.Path != want || got.Scope || !slices.Equal(got.Controllers, []string{"cpuset", "cpu", "io", "memory", "pids"}) {
		t.Errorf("got %+v, want %s with all controllers", got, want)
	}
	if len(got.Attempts) != 2 || !strings.Contains(got.Attempts[0], "may not write") || !strings.Contains(got.Attempts[1], want) {
		t.Errorf("attempts %q", got.Attempts)
	}
	if !strings.Contains(got.Hint, "loginctl enable-linger ann") {
		t.Errorf("hint %q says nothing of the end of the session", got.Hint)
	}
	if fake.closed != 2 {
		t.Errorf("%d connections closed, want 2", fake.closed)
	}
}

// linger makes the user one whose systemd runs without a login.
func linger(t *testing.T, h host) {
	t.Helper()
	dir := filepath.Join(h.root, "/var/lib/systemd/linger")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "ann"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestScopeWithLingerMissesNothing(t *testing.T) {
	h, _ := session(t, "cpuset cpu io memory pids")
	linger(t, h)
	found := mustFind(t, h)
	got, err := h.obtain(found, "x")
	if err != nil || found.Hint != "" || got.Hint != "" {
		t.Errorf("hints %q and %q, error %v, want none", found.Hint, got.Hint, err)
	}
}

func TestScopeWithoutDropIn(t *testing.T) {
	h, _ := session(t, "memory pids")
	got, err := h.obtain(mustFind(t, h), "x")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Controllers, []string{"memory", "pids"}) || !strings.Contains(got.Hint, "cpu cpuset io: not delegated by systemd; run `sudo mkdir -p /etc/systemd/system/user@.service.d") {
		t.Errorf("controllers %v, hint %q", got.Controllers, got.Hint)
	}
	if !strings.Contains(got.Hint, "log in again") {
		t.Errorf("hint %q does not say when the drop-in counts", got.Hint)
	}
	linger(t, h)
	if hint := mustFind(t, h).Hint; strings.Contains(hint, "log in") || !strings.Contains(hint, "sudo systemctl restart user@1000.service") {
		t.Errorf("hint %q: to log in again does not restart a systemd that lingers", hint)
	}
}

func TestScopeRefused(t *testing.T) {
	h, fake := session(t, "cpuset cpu io memory pids")
	found := mustFind(t, h)
	fake.refusal = errors.New("start scope: access denied")
	got, err := h.obtain(found, "x")
	if err != nil {
		t.Fatal(err)
	}
	if got.Path != "" || !strings.Contains(got.Sentence, "may not write") || !strings.Contains(got.Attempts[1], "access denied") {
		t.Errorf("%+v: want no cgroup, and why", got)
	}
}

func TestScopeThatGivesNoMoreIsNotMade(t *testing.T) {
	h, fake := session(t, "memory pids")
	// This process is in a scope of its own already, which has what the manager has.
	if err := fake.startScope(t.Context(), "run-r1.scope", "", 4242); err != nil {
		t.Fatal(err)
	}
	found := mustFind(t, h)
	if found.Scope || !strings.HasSuffix(found.Path, "/run-r1.scope") || !strings.Contains(found.Attempts[1], "gives no more (memory pids)") {
		t.Errorf("%+v", found)
	}
}

func TestNoUserSystemd(t *testing.T) {
	h, _ := session(t, "")
	h.dial = func(context.Context) (manager, error) { return nil, errors.New("no such socket") }
	if err := os.RemoveAll(filepath.Join(h.root, "/run/user/1000/systemd")); err != nil {
		t.Fatal(err)
	}
	found := mustFind(t, h)
	for _, want := range []string{"sudo loginctl enable-linger ann", "sudo systemd-run --uid=ann -p Delegate=yes"} {
		if !strings.Contains(found.Hint, want) {
			t.Errorf("hint %q lacks %q", found.Hint, want)
		}
	}
	if found.Scope || len(found.Attempts) != 2 || !strings.Contains(found.Attempts[1], "no such socket") {
		t.Errorf("%+v", found)
	}
}

// TestDialWithoutBus: nothing listens there, and no bus is started.
func TestDialWithoutBus(t *testing.T) {
	t.Setenv("DBUS_SESSION_BUS_ADDRESS", "autolaunch:")
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	bus := fmt.Sprintf("/run/user/%d/bus", os.Getuid())
	if _, err := os.Lstat(bus); err == nil {
		t.Skipf("this user has a session bus, %s, which is always looked for", bus)
	}
	if m, err := dialUserSystemd(t.Context()); err == nil {
		m.close()
		t.Error("something answers")
	} else if !strings.Contains(err.Error(), bus) {
		t.Errorf("it does not tell where it has looked: %v", err)
	}
}

func TestBusAddresses(t *testing.T) {
	env := map[string]string{"XDG_RUNTIME_DIR": "/run/user/7", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/user/7/bus"}
	if got := busAddresses(func(k string) string { return env[k] }, 7); !slices.Equal(got, []string{"unix:path=/run/user/7/bus"}) {
		t.Errorf("%q: each once", got)
	}
	env = map[string]string{"XDG_RUNTIME_DIR": "/tmp/a b", "DBUS_SESSION_BUS_ADDRESS": "autolaunch:"}
	if got := busAddresses(func(k string) string { return env[k] }, 7); !slices.Equal(got, []string{"unix:path=/tmp/a%20b/bus", "unix:path=/run/user/7/bus"}) {
		t.Errorf("%q", got)
	}
}

// TestJoin: who may write both places moves by itself, else the user's systemd is asked, if the node is in a unit.
func TestJoin(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may write everything; to run this test: scripts/as-user.sh make test-unit")
	}
	h, fake := session(t, "cpuset cpu io memory pids")
	unit := "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/coracle-x-1.scope"
	node := unit + "/coracle-x"
	procs := filepath.Join(h.root, node, supervisor, procsFile)
	if err := errors.Join(os.MkdirAll(filepath.Dir(procs), 0o755), os.WriteFile(procs, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := h.join(node); err != nil || len(fake.attached) > 0 {
		t.Errorf("%v, attached %q", err, fake.attached)
	}
	if moved, err := os.ReadFile(procs); err != nil || string(moved) != self {
		t.Errorf("%s holds %q, %v", procs, moved, err)
	}
	if err := os.Chmod(procs, 0); err != nil {
		t.Fatal(err)
	}
	if err := h.join(node); err != nil || len(fake.attached) != 1 || fake.attached[0] != fmt.Sprintf("coracle-x-1.scope /coracle-x/supervisor %d", os.Getpid()) {
		t.Errorf("%v, attached %q", err, fake.attached)
	}
	fake.refusal = errors.New("access denied")
	if err := h.join(node); err == nil {
		t.Error("a refusal of systemd's is no error")
	}
}
