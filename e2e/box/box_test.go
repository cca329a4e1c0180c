package box

import (
	"net"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	Init()
	os.Exit(m.Run())
}

// ordinary skips where a box cannot be made, which is for ordinary users with subordinate ids.
func ordinary(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		t.Skip("a box is for an ordinary user, this is root")
	}
	for _, f := range []string{"/etc/subuid", "/etc/subgid"} {
		if _, _, err := SubIDs(f); err != nil {
			t.Skip(err)
		}
	}
}

func TestBoxIsAHost(t *testing.T) {
	if !Inside() {
		ordinary(t)
		Run(t, Host{Names: map[string]string{"a.corp.test": Address}, Search: "corp.test"})
		return
	}
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if u.Uid == "0" || os.Getpid() == 1 {
		t.Errorf("uid %s, pid %d: want an ordinary process", u.Uid, os.Getpid())
	}
	for _, name := range []string{"a", "a.corp.test"} {
		if got, err := net.LookupHost(name); err != nil || len(got) != 1 || got[0] != Address {
			t.Errorf("look up %s: %v, %v", name, got, err)
		}
	}
	if got, err := net.LookupHost("b.corp.test"); err == nil {
		t.Errorf("look up b.corp.test: %v, want none", got)
	}
	if l, err := net.Listen("tcp", Address+":0"); err != nil {
		t.Error(err)
	} else {
		l.Close()
	}
	// The node's own way: a user namespace of a further depth, with subordinate ids.
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	first, count, err := SubIDs("/etc/subuid")
	if err != nil || count < 60000 {
		t.Fatalf("subordinate ids: %d from %d, %v", count, first, err)
	}
	out, err := exec.Command("newuidmap", strconv.Itoa(cmd.Process.Pid), "0", u.Uid, "1", "1", strconv.Itoa(first), strconv.Itoa(count)).CombinedOutput()
	if err != nil {
		t.Errorf("newuidmap in the box: %v: %s", err, out)
	}
}

func TestBoxWithoutUserNamespaces(t *testing.T) {
	if !Inside() {
		ordinary(t)
		Run(t, Host{NoUserns: true, NoSubIDs: true, NoTun: true})
		return
	}
	if err := exec.Command("unshare", "--user", "true").Run(); err == nil {
		t.Error("a user namespace could be made")
	}
	if _, err := os.Stat("/dev/net/tun"); !os.IsNotExist(err) {
		t.Errorf("/dev/net/tun: %v", err)
	}
	if raw, err := os.ReadFile("/etc/subuid"); err != nil || strings.TrimSpace(string(raw)) != "" {
		t.Errorf("/etc/subuid: %q, %v", raw, err)
	}
}

// A long log may stand between what a test said and its end.
func TestBoxTellsWhatTheTestSaid(t *testing.T) {
	if Inside() {
		t.Error("the reason")
		t.Log("a log" + strings.Repeat("\n        a line", 100))
		return
	}
	ordinary(t)
	err := run(Host{}, only(t))
	if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), "the reason") || strings.Contains(err.Error(), "a line") {
		t.Errorf("of a test that failed: %v", err)
	}
}

func TestRemoveAllTakesFilesOfSubordinateIDs(t *testing.T) {
	ordinary(t)
	// The user's own directory holds one of a container's user, which the user may not look into.
	dir, err := os.MkdirTemp("", "box")
	if err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "60")
	sleeper.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, Pdeathsig: syscall.SIGKILL}
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() }()
	pid := strconv.Itoa(sleeper.Process.Pid)
	for tool, own := range map[string][2]string{"newuidmap": {strconv.Itoa(os.Getuid()), "/etc/subuid"}, "newgidmap": {strconv.Itoa(os.Getgid()), "/etc/subgid"}} {
		first, count, err := SubIDs(own[1])
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tool, pid, "0", own[0], "1", "1", strconv.Itoa(first), strconv.Itoa(count)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	script := "cd " + dir + " && mkdir -p a/b && touch a/b/c && chmod 0700 a && chown -R 5:5 a"
	if out, err := exec.Command("nsenter", "-t", pid, "--user", "-S", "0", "-G", "0", "--", "sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.RemoveAll(dir); err == nil {
		t.Error("the user could remove the directory: nothing is tested")
	}
	if err := RemoveAll(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("directory: %v", err)
	}
}
