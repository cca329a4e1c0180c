package rootless

import (
	"bufio"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/rootless-containers/rootlesskit/v3/pkg/parent"
	"golang.org/x/sys/unix"
)

// Whatever lies in the lock's place, a node can start; and no other file is changed for it.
func TestALockIsTakenWhateverIsInItsPlace(t *testing.T) {
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	for what, put := range map[string]func(path string) error{
		"a directory":       func(path string) error { return os.MkdirAll(filepath.Join(path, "inside"), 0o700) },
		"a fifo":            func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a dangling link":   func(path string) error { return os.Symlink("/nonexistent/lock", path) },
		"a loop":            func(path string) error { return os.Symlink(path, path) },
		"a link to another": func(path string) error { return os.Symlink(other, path) },
		"a file of no mode": func(path string) error { return os.WriteFile(path, nil, 0) },
		"a socket": func(path string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		},
	} {
		n := testNode(t)
		if err := put(n.lockFile()); err != nil {
			t.Fatal(err)
		}
		lock, err := n.TryLock()
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if _, err := n.TryLock(); !errors.Is(err, ErrUp) {
			t.Errorf("%s: a second holder: %v", what, err)
		}
		if info, err := os.Lstat(n.lockFile()); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: the lock is %v, %v", what, info, err)
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(other); err != nil || info.Mode() != 0o400 {
		t.Errorf("a file that was linked to: %v, %v", info, err)
	}
}

// Nodes with different data directories that have the runtime directory in common.
func TestARuntimeDirectoryHasOneHolder(t *testing.T) {
	a := testNode(t)
	b := a
	b.DataDir = t.TempDir()
	lock, err := a.TryLock()
	if err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		if err := b.MakeDirs(); err != nil {
			t.Fatal(err)
		}
		if _, err := b.TryLock(); !errors.Is(err, ErrUpElsewhere) || !errors.Is(err, ErrUp) {
			t.Errorf("%s: %v", when, err)
		}
	}
	refused("a second holder")
	if err := errors.Join(a.WriteRecord(Record{}), a.Empty()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(a.RuntimeDir); err != nil || len(entries) != 0 {
		t.Errorf("once it is emptied: %v, %v", entries, err)
	}
	refused("once it is emptied")
	if err := a.Sweep(); err != nil {
		t.Fatal(err)
	}
	without, err := b.TryLock()
	if err != nil || without.HoldsRuntime() {
		t.Fatalf("without a runtime directory: %+v, %v", without, err)
	}
	if err := errors.Join(without.Release(), b.MakeDirs()); err != nil {
		t.Fatal(err)
	}
	with, err := b.TryLock()
	if err != nil || !with.HoldsRuntime() {
		t.Fatalf("in a new directory: %+v, %v", with, err)
	}
	if err := errors.Join(lock.Release(), with.Release()); err != nil {
		t.Error(err)
	}
}

// In a mount namespace of its own, as a container is, a process may lock another file of the same name.
func TestALocksHolderIsKnownByTheFile(t *testing.T) {
	n := testNode(t)
	lock, err := n.TryLock()
	if err != nil {
		t.Fatal(err)
	}
	if pids := holders(n.lockFile()); !slices.Contains(pids, os.Getpid()) {
		t.Errorf("its holder, %d, is not among %v", os.Getpid(), pids)
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.lockFile(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := exec.Command("sh", "-c", `mount -t tmpfs other "$1" && : >"$2" && exec flock "$2" sh -c 'echo locked; exec cat'`,
		"sh", filepath.Dir(n.lockFile()), n.lockFile())
	other.Stderr = os.Stderr
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}}
	input, err1 := other.StdinPipe()
	output, err2 := other.StdoutPipe()
	if err := errors.Join(err1, err2, other.Start()); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); err != nil {
		t.Errorf("the other file is not locked: %q, %v", line, err)
	} else if pids := holders(n.lockFile()); len(pids) > 0 {
		t.Errorf("another file of that name is locked, and %v are taken for holders of this one", pids)
	}
	if err := errors.Join(input.Close(), other.Wait()); err != nil {
		t.Error(err)
	}
}

// RootlessKit's parent tries its lock once: who looks whether there is one must not be in its way.
func TestLookingForAParentTakesNoLock(t *testing.T) {
	n := testNode(t)
	if err := os.Mkdir(n.RootlesskitDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		for range 40 {
			n.Lives()
		}
	}()
	for goesOn := true; goesOn; {
		lock, err := parent.LockStateDir(n.RootlesskitDir())
		if err != nil {
			t.Error(err)
			break
		}
		if err := lock.Unlock(); err != nil {
			t.Error(err)
		}
		select {
		case <-looked:
			goesOn = false
		default:
		}
	}
	<-looked
	lock, err := parent.LockStateDir(n.RootlesskitDir())
	if err != nil {
		t.Fatal(err)
	}
	if !n.Lives() {
		t.Error("a parent that has its lock is not seen")
	}
	if err := lock.Unlock(); err != nil || n.Lives() {
		t.Errorf("a parent without its lock is seen, %v", err)
	}
}
