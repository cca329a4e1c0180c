package keeper_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

func TestLongAndUnendedLinesArePartial(t *testing.T) {
	n := newNode(t)
	// 40,000 bytes and a newline; exactly 16 KiB and a newline; an empty line; no newline at the end.
	n.run("c1", sh(`head -c 40000 /dev/zero | tr '\0' x; echo; head -c 16384 /dev/zero | tr '\0' y; echo; echo; printf end`))
	x, y := strings.Repeat("x", 16384), strings.Repeat("y", 16384)
	want := []string{"stdout P " + x, "stdout P " + x, "stdout F " + x[:40000-2*16384], "stdout F " + y, "stdout F ", "stdout P end"}
	if got := n.lines("c1"); !slices.Equal(got, want) {
		for _, l := range got {
			t.Logf("%.40s… (%d)", l, len(l))
		}
		t.Errorf("%d lines, want %d", len(got), len(want))
	}
	info, err := os.Stat(n.logPath("c1"))
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestRotationLosesAndDoublesNoLine(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	const count = 20000
	n.create("c1", sh(fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line-$i; i=$((i+1)); done", count)))
	n.start("c1")
	rotated := 0
	for ; rotated < 50; rotated++ {
		if err := os.Rename(n.logPath("c1"), fmt.Sprintf("%s.%d", n.logPath("c1"), rotated)); err != nil {
			t.Fatal(err)
		}
		if err := n.ReopenLog(ctx, "c1", n.dir); errors.Is(err, ctr.ErrNotRunning) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(n.logPath("c1")); err != nil {
			t.Fatal(err)
		}
	}
	n.exit("c1")
	var got []string
	for i := range rotated + 1 {
		if path := fmt.Sprintf("%s.%d", n.logPath("c1"), i); exists(path) {
			got = append(got, logLines(t, path)...)
		}
	}
	if exists(n.logPath("c1")) {
		got = append(got, n.lines("c1")...)
	}
	if len(got) != count {
		t.Fatalf("%d lines in %d files, want %d", len(got), rotated+1, count)
	}
	for i, l := range got {
		if l != fmt.Sprintf("stdout F line-%d", i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if rotated < 5 {
		t.Errorf("only %d rotations", rotated)
	}
	_ = os.Remove(n.logPath("c1"))
	if err := n.ReopenLog(ctx, "c1", n.dir); !errors.Is(err, ctr.ErrNotRunning) || exists(n.logPath("c1")) {
		t.Errorf("reopen after the exit: %v, file made: %v", err, exists(n.logPath("c1")))
	}
	if err := n.ReopenLog(ctx, "nobody", n.dir); !errors.Is(err, ctr.ErrNotFound) {
		t.Errorf("reopen for an unknown container: %v", err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestAFullDiskStopsTheLogAndNotTheContainer(t *testing.T) {
	n := newNode(t)
	small := filepath.Join(n.dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(small, "filler")
	if err := os.WriteFile(filler, make([]byte, 980<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(small, "c1.log")
	n.create("c1", sh(`seq 1 50000; touch /tmp/full; while [ ! -e /tmp/go ]; do sleep 0.02; done; echo after; exit 6`),
		func(r *ctr.CreateRequest) { r.LogPath = path })
	n.start("c1")
	eventually(t, "the container has written all", func() bool { return n.execCode("c1", "test", "-e", "/tmp/full") == 0 })
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if code := n.execCode("c1", "touch", "/tmp/go"); code != 0 {
		t.Fatalf("exec: %d", code)
	}
	if s := n.exit("c1"); s.ExitCode != 6 {
		t.Errorf("exit %+v", s)
	}
	raw, err := os.ReadFile(path)
	if err != nil || !strings.HasSuffix(string(raw), " stdout F after\n") {
		t.Errorf("log ends with %q, %v", raw[max(0, len(raw)-80):], err)
	}
	if strings.Count(n.log.String(), "cannot be written") != 1 || !strings.Contains(n.log.String(), "dropped_bytes=") {
		t.Errorf("the keeper's log:\n%s", n.log)
	}
	n.delete("c1")
}

func TestALogIsNotWrittenThroughASymbolicLink(t *testing.T) {
	n := newNode(t)
	target := filepath.Join(n.dir, "target")
	if err := os.Symlink(target, n.logPath("c1")); err != nil {
		t.Fatal(err)
	}
	_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "c1", Spec: sh("true"), LogPath: n.logPath("c1")})
	if err == nil || exists(target) {
		t.Errorf("create: %v, target made: %v", err, exists(target))
	}
}

// A container that has the log directory as a volume can put a FIFO there: its open waits for a reader, for ever.
func TestALogIsARegularFile(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	fifo := func(id string) {
		t.Helper()
		if err := os.Remove(n.logPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(n.logPath(id), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fifo("c1")
	if _, err := n.Create(ctx, ctr.CreateRequest{ID: "c1", Spec: sh("true"), LogPath: n.logPath("c1")}); err == nil || ctx.Err() != nil {
		t.Errorf("create: %v", err)
	}
	n.create("c2", sh("sleep 60"))
	n.start("c2")
	fifo("c2")
	reader, err := os.OpenFile(n.logPath("c2"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := n.ReopenLog(ctx, "c2", n.dir); err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("reopen on a FIFO that has a reader: %v", err)
	}
	n.delete("c2")
}

func TestNoLogIsKeptWhereNoneIsAskedFor(t *testing.T) {
	n := newNode(t)
	if s := n.run("c1", sh("seq 1 100000"), func(r *ctr.CreateRequest) { r.LogPath = "" }); s.ExitCode != 0 {
		t.Errorf("exit %+v", s)
	}
}
