package cgroupv2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEnterAfterCrash(t *testing.T) {
	d := delegation(t)
	stale := group(d.Path).join("coracle-" + nodeName(t))
	leaf := stale.join("pods").join("podold").join("c")
	if err := os.MkdirAll(string(leaf), 0o755); err != nil {
		t.Fatal(err)
	}
	door := group(string(stale) + ".door")
	if _, err := door.mkdir(); err != nil {
		t.Fatal(err)
	}
	cmd := role("sleeper")
	if err := start(cmd, leaf); err != nil {
		t.Fatal(err)
	}
	enter(t)
	if !killed(cmd) {
		t.Error("the crashed node's process was not killed")
	}
	if leaf.exists() || door.exists() {
		t.Error("the crashed node's cgroups are left")
	}
}

func TestRemoveStale(t *testing.T) {
	d := delegation(t)
	stale := group(d.Path).join("coracle-" + nodeName(t))
	if err := os.MkdirAll(string(stale.join("supervisor")), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		// As a later `coracle down` calls it: with the recorded path alone.
		if err := RemoveStale(Delegation{Path: filepath.Dir(string(stale))}, nodeName(t)); err != nil {
			t.Fatal(err)
		}
	}
	if stale.exists() {
		t.Errorf("%s is left", stale)
	}
}

func TestThePathOfANodeIsKnownBeforeItEnters(t *testing.T) {
	d := delegation(t)
	want := d.NodePath(nodeName(t))
	if got := NodeName(want); got != nodeName(t) {
		t.Errorf("name %q of %s", got, want)
	}
	if g, _ := enter(t); g.Path() != want {
		t.Errorf("entered %s, and %s was promised", g.Path(), want)
	}
}

func TestRemoveStaleSparesItself(t *testing.T) {
	enter(t)
	pl, err := thisHost().locate()
	if err != nil {
		t.Fatal(err)
	}
	above := pl.dir(filepath.Dir(filepath.Dir(pl.own)))
	if err := RemoveStale(Delegation{Path: above}, nodeName(t)); err == nil {
		t.Error("no error for the cgroup that this process is in")
	}
}

func TestEnterRefuses(t *testing.T) {
	if _, err := (Delegation{}).Enter("x"); !errors.Is(err, ErrNoDelegation) {
		t.Errorf("error %v, want ErrNoDelegation", err)
	}
	for _, name := range []string{"", "..", "a/b"} {
		if _, err := (Delegation{Path: t.TempDir()}).Enter(name); !errors.Is(err, ErrInvalidPath) {
			t.Errorf("%q: error %v, want ErrInvalidPath", name, err)
		}
	}
}

// TestEnterBesideStarter is `up --detach` in a scope of its own: the process that waits shares the delegation with
// the one that enters, must not keep the controllers from it, and must survive Leave.
func TestEnterBesideStarter(t *testing.T) {
	g, tree := enter(t)
	scope := g.node.join("scope")
	if _, err := scope.mkdir(); err != nil {
		t.Fatal(err)
	}
	cmd := role("starter")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := start(cmd, scope); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if want := "controllers: " + strings.Join(tree.Controllers(), " "); strings.TrimRight(out.String(), "\n") != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	if below, err := scope.children(); err != nil || len(below) > 0 {
		t.Errorf("%v are left in the scope; %v", below, err)
	}
	if left, err := scope.inForce(); err != nil || len(left) > 0 {
		t.Errorf("controllers %v are left enabled in the scope; %v", left, err)
	}
}

func starterRole() error {
	cmd := role("detached")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func detachedRole() error {
	d, err := Find()
	if err != nil {
		return err
	}
	origin := d.Path
	g, err := d.Enter("inner")
	if err != nil {
		return err
	}
	leaf := g.node.join(supervisor)
	if _, err := leaf.mkdir(); err != nil {
		return err
	}
	if err := leaf.take(self); err != nil {
		return err
	}
	tree, err := Open(g.Path())
	if err != nil {
		return err
	}
	fmt.Println("controllers:", strings.Join(tree.Controllers(), " "))
	if err := g.Leave(); err != nil {
		return err
	}
	for _, pid := range []int{os.Getpid(), os.Getppid()} {
		pids, err := group(origin).procs()
		if err != nil {
			return err
		}
		if !slices.Contains(pids, pid) {
			return fmt.Errorf("process %d is not back in %s: %v", pid, origin, pids)
		}
	}
	return nil
}

// TestMountInside runs insideRole in user, mount, pid and cgroup namespaces whose root is the node's cgroup.
func TestMountInside(t *testing.T) {
	d := delegation(t)
	g, err := d.Enter(nodeName(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.Leave(), g.Leave()); err != nil {
			t.Error(err)
		}
	})
	cmd := role("inside")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID
	cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWCGROUP
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// As rootlesskit's parent does: everybody goes to the leaf once the child's namespaces are there.
	time.Sleep(50 * time.Millisecond)
	leaf := g.node.join(supervisor)
	if _, err := leaf.mkdir(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{os.Getpid(), cmd.Process.Pid} {
		if err := leaf.take(fmt.Sprint(pid)); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if want := "controllers: " + strings.Join(d.Controllers, " ") + "\n"; out.String() != want {
		t.Errorf("inside: %q, want %q", out.String(), want)
	}
}

func insideRole() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	for { // until the parent moved us to the leaf
		raw, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			return err
		}
		if strings.Contains(string(raw), "0::"+supervisor+"\n") {
			break
		}
		time.Sleep(time.Millisecond)
	}
	for range 2 { // the second finds it done
		if err := MountInside(); err != nil {
			return err
		}
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if n := strings.Count(string(raw), " "+cgroupMount+" rw,nosuid,nodev,noexec"); n != 2 {
		return fmt.Errorf("%d mounts of ours on %s, want a tmpfs and a cgroup2", n, cgroupMount)
	}
	tree, err := Open(cgroupMount)
	if err != nil {
		return err
	}
	if !tree.Usable() {
		return errors.New(tree.Reason())
	}
	pod, err := tree.MakePod("", "inside")
	if err != nil {
		return err
	}
	leaf := tree.mount.join(pod).join("c1")
	if _, err := leaf.mkdir(); err != nil {
		return err
	}
	cmd := role("sleeper")
	if err := start(cmd, leaf); err != nil {
		return err
	}
	if _, err := tree.Stats(pod); err != nil {
		return err
	}
	if err := tree.RemovePod(pod); err != nil {
		return err
	}
	if !killed(cmd) {
		return errors.New("the process was not killed")
	}
	fmt.Println("controllers:", strings.Join(tree.Controllers(), " "))
	return nil
}
