package keeper_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// logPlace is the kubelet's form of a log's path, c/0.log below the pod's directory, which a container may have as a
// volume; and a directory of the host's in which there is another pod's log of the same name.
type logPlace struct {
	logs, place, log, host, victim string
}

const othersLog = "another pod's log\n"

func newLogPlace(t *testing.T, n *node) logPlace {
	t.Helper()
	p := logPlace{logs: filepath.Join(n.dir, "logs"), host: filepath.Join(n.dir, "host")}
	p.place, p.victim = filepath.Join(p.logs, "c"), filepath.Join(p.host, "0.log")
	p.log = filepath.Join(p.place, "0.log")
	for _, d := range []string{p.logs, p.place, p.host} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(p.victim, []byte(othersLog), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p logPlace) of(r *ctr.CreateRequest) { r.LogDir, r.LogPath = p.logs, p.log }

// untouched looks at the directory of the host's.
func (p logPlace) untouched(t *testing.T) {
	t.Helper()
	raw, err := os.ReadFile(p.victim)
	if err != nil || string(raw) != othersLog {
		t.Errorf("outside of the log directory: %.120q, %v", raw, err)
	}
	entries, err := os.ReadDir(p.host)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside of the log directory: %v, %v", entries, err)
	}
}

// TestALogIsNotWrittenThroughALinkedDirectory: what a container that has the log directory as a volume puts in the place of
// the directory that its log lies in.
func TestALogIsNotWrittenThroughALinkedDirectory(t *testing.T) {
	n := newNode(t)
	p := newLogPlace(t, n)
	ctx := context.Background()
	n.create("c1", sh("while :; do echo forged; sleep 0.01; done"), p.of)
	n.start("c1")
	moved := filepath.Join(p.logs, "moved")
	if err := os.Rename(p.place, moved); err != nil {
		t.Fatal(err)
	}
	for what, put := range map[string]func() error{
		"a relative link":       func() error { return os.Symlink("../host", p.place) },
		"an absolute one":       func() error { return os.Symlink(p.host, p.place) },
		"one through /proc":     func() error { return os.Symlink("/proc/self/root"+p.host, p.place) },
		"a file":                func() error { return os.WriteFile(p.place, nil, 0o600) },
		"one that stays inside": func() error { return os.Symlink("moved", p.place) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		err := n.ReopenLog(ctx, "c1", p.logs)
		if !errors.Is(err, ctr.ErrLogReplaced) || !strings.Contains(err.Error(), "file of before") {
			t.Errorf("reopen, where %s is: %v", what, err)
		}
		_, err = n.Create(ctx, ctr.CreateRequest{ID: "c2", Spec: sh("echo forged"), LogDir: p.logs, LogPath: p.log})
		if !errors.Is(err, ctr.ErrLogReplaced) {
			t.Errorf("create, where %s is: %v", what, err)
		}
		if err := os.Remove(p.place); err != nil {
			t.Fatal(err)
		}
	}
	if got := n.growing(filepath.Join(moved, "0.log")); !got {
		t.Error("the log of before does not go on")
	}
	if err := os.Mkdir(p.place, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := n.ReopenLog(ctx, "c1", p.logs); err != nil || !n.growing(p.log) {
		t.Errorf("reopen in a directory: %v", err)
	}
	p.untouched(t)
	n.delete("c1")
}

// growing waits for more text in a file.
func (n *node) growing(path string) bool {
	n.t.Helper()
	size := func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			n.t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	eventually(n.t, path+" grows", func() bool { return size() > before })
	return true
}

// TestALogStaysInItsDirectoryWhileItIsExchanged: the directory is now one, now a link, while the log is opened.
func TestALogStaysInItsDirectoryWhileItIsExchanged(t *testing.T) {
	n := newNode(t)
	p := newLogPlace(t, n)
	link := filepath.Join(p.logs, "link")
	if err := os.Symlink("../host", link); err != nil {
		t.Fatal(err)
	}
	n.create("c1", sh("while :; do echo forged; done"), p.of)
	n.start("c1")
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, p.place, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	})
	opened, refused := 0, 0
	for round := 0; round < 300 || opened == 0 || refused == 0; round++ {
		switch err := n.ReopenLog(context.Background(), "c1", p.logs); {
		case err == nil:
			opened++
		case errors.Is(err, ctr.ErrLogReplaced):
			refused++
		default:
			t.Errorf("reopen: %v", err)
		}
		if round > 20000 || t.Failed() {
			break
		}
	}
	close(stop)
	swapper.Wait()
	if opened == 0 || refused == 0 {
		t.Errorf("nothing is proved: %d opened, %d refused", opened, refused)
	}
	n.delete("c1") // all lines are written
	p.untouched(t)
}

// TestALogThatIsLeasedIsRefused: who has a lease on a file can let every open of it wait.
func TestALogThatIsLeasedIsRefused(t *testing.T) {
	n := newNode(t)
	p := newLogPlace(t, n)
	ctx := context.Background()
	n.create("c1", sh("while :; do echo line; sleep 0.01; done"), p.of)
	n.start("c1")
	if err := os.Rename(p.log, p.log+".1"); err != nil {
		t.Fatal(err)
	}
	leased, err := os.Create(p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer leased.Close()
	if _, err := unix.FcntlInt(leased.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{p.logs, ""} {
		if err := n.ReopenLog(ctx, "c1", dir); !errors.Is(err, ctr.ErrLogReplaced) || !strings.Contains(err.Error(), "lease") {
			t.Errorf("reopen below %q: %v", dir, err)
		}
	}
	if err := leased.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.ReopenLog(ctx, "c1", p.logs); err != nil || !n.growing(p.log) {
		t.Errorf("reopen without the lease: %v", err)
	}
	n.delete("c1")
}

// TestALogOfADaemonOfBefore: it names no directory, and its logs are opened by their path alone. A daemon that does protects
// them when they are opened again, since the keeper goes by what it is told then.
func TestALogOfADaemonOfBefore(t *testing.T) {
	n := newNode(t)
	p := newLogPlace(t, n)
	ctx := context.Background()
	n.create("c1", sh("while :; do echo line; sleep 0.01; done"), func(r *ctr.CreateRequest) { r.LogPath = p.log })
	n.start("c1")
	if err := os.Rename(p.log, p.log+".1"); err != nil {
		t.Fatal(err)
	}
	if err := n.ReopenLog(ctx, "c1", ""); err != nil || !n.growing(p.log) {
		t.Errorf("reopen by the path alone: %v", err)
	}
	if err := errors.Join(os.RemoveAll(p.place), os.Symlink("../host", p.place)); err != nil {
		t.Fatal(err)
	}
	if err := n.ReopenLog(ctx, "c1", p.logs); !errors.Is(err, ctr.ErrLogReplaced) {
		t.Errorf("reopen below the directory: %v", err)
	}
	p.untouched(t)
	n.delete("c1")
}

func TestALogIsBelowItsDirectory(t *testing.T) {
	n := newNode(t)
	for _, path := range []string{"/tmp/0.log", n.dir, filepath.Join(n.dir, "../0.log")} {
		_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "c1", Spec: sh("true"), LogDir: n.dir, LogPath: path})
		if err == nil || !strings.Contains(err.Error(), "not below") {
			t.Errorf("%s: %v", path, err)
		}
	}
}
