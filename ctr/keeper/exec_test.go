package keeper_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

// execCode runs a program in a container to its end.
func (n *node) execCode(id string, args ...string) int {
	n.t.Helper()
	s, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: id, Process: process(args...)})
	if err != nil {
		n.t.Fatal(err)
	}
	code, err := s.Wait(context.Background())
	if err := errors.Join(err, s.Close()); err != nil {
		n.t.Fatal(err)
	}
	return code
}

func (n *node) idle(id string) ctr.State {
	n.t.Helper()
	state := n.create(id, sh("trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"))
	n.start(id)
	return state
}

func TestExecHasItsStreamsAndExitCode(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.idle("c1")
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	errR, errW := pipe(t)
	p := process("/bin/sh", "-c", "cat; echo $WORD >&2; exit 42")
	p.Env = append(p.Env, "WORD=hello")
	s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: p, Streams: ctr.Streams{Stdin: inR, Stdout: outW, Stderr: errW}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inW.WriteString("through the pipe\n"); err != nil {
		t.Fatal(err)
	}
	inW.Close()
	if got := readAll(t, outR); got != "through the pipe\n" {
		t.Errorf("stdout %q", got)
	}
	if got := readAll(t, errR); got != "hello\n" {
		t.Errorf("stderr %q", got)
	}
	if code, err := s.Wait(ctx); code != 42 || err != nil {
		t.Errorf("exit %d, %v", code, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if code := n.execCode("c1", "/bin/sh", "-c", "kill -9 $$"); code != 137 {
		t.Errorf("killed by a signal: %d", code)
	}
	// Without streams they are /dev/null.
	if code := n.execCode("c1", "/bin/sh", "-c", "read x || exit 11"); code != 11 {
		t.Errorf("read from no stdin: %d", code)
	}
	// Nor is it a file of the node's that takes the place of one among others.
	r, w := pipe(t)
	for _, streams := range []ctr.Streams{{}, {Stdout: w}} {
		s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Streams: streams,
			Process: process("/bin/sh", "-c", "stat -L -c %t:%T /proc/$$/fd/2; [ $(stat -L -c %t:%T /proc/$$/fd/2) = 1:3 ]")})
		if err != nil {
			t.Fatal(err)
		}
		if code, err := s.Wait(ctx); code != 0 || err != nil {
			t.Errorf("stderr of %+v is not /dev/null: exit %d, %v", streams, code, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := readAll(t, r); got != "1:3\n" {
		t.Errorf("stderr is %q", got)
	}
}

// TestAUserThatIsNotRootCanOpenItsStreams: programs write to /dev/stdout, which opens the pipe again.
func TestAUserThatIsNotRootCanOpenItsStreams(t *testing.T) {
	if nstest.IDs() == 1 {
		t.Skip("this user has no subordinate ids")
	}
	n := newNode(t)
	script := "echo out > /proc/self/fd/1; echo err > /proc/self/fd/2; sleep 1000"
	s := sh(script)
	s.Process.User.UID, s.Process.User.GID = 1000, 1000
	n.create("c1", s)
	n.start("c1")
	eventually(t, "both lines are logged", func() bool { return len(n.lines("c1")) == 2 })
	r, w := pipe(t)
	p := process("/bin/sh", "-c", "id -u > /proc/self/fd/1")
	p.User = s.Process.User
	e, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: "c1", Process: p, Streams: ctr.Streams{Stdout: w}})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if got := readAll(t, r); got != "1000\n" {
		t.Errorf("output %q", got)
	}
}

func TestExecThatCannotStartSaysWhy(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.create("c1", sh("sleep 1000"))
	exec := func(id string, p *specs.Process) error {
		r, w := pipe(t)
		s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: id, Process: p, Streams: ctr.Streams{Stdout: w}})
		if err == nil {
			return s.Close()
		}
		if got := readAll(t, r); got != "" { // and its streams are closed
			t.Errorf("output %q", got)
		}
		return err
	}
	if err := exec("c1", process("true")); !errors.Is(err, ctr.ErrNotRunning) {
		t.Errorf("in a container that is not started: %v", err)
	}
	if err := exec("nobody", process("true")); !errors.Is(err, ctr.ErrNotFound) {
		t.Errorf("in an unknown container: %v", err)
	}
	n.start("c1")
	if err := exec("c1", process("nope")); err == nil || !strings.Contains(err.Error(), "not found in $PATH") {
		t.Errorf("of no program: %v", err)
	}
	if err := exec("c1", &specs.Process{}); err == nil || !strings.Contains(err.Error(), "no command") {
		t.Errorf("of nothing: %v", err)
	}
	n.delete("c1")
	n.run("c2", sh("true"))
	if err := exec("c2", process("true")); !errors.Is(err, ctr.ErrNotRunning) {
		t.Errorf("in an exited container: %v", err)
	}
}

func TestExecHasATerminalThatResizes(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.idle("c1")
	// crun sets the size while the process may run already.
	p := process("/bin/sh", "-c", `i=0; until [ -n "$(stty size 2>/dev/null)" ] || [ $i -ge 500 ]; do i=$((i+1)); sleep 0.01; done
		stty size; tty; read line; stty size; echo got $line; exit 5`)
	p.ConsoleSize = &specs.Box{Width: 80, Height: 24}
	s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: p, TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	console := s.Console()
	lines := bufio.NewScanner(console)
	expect := func(want string) {
		t.Helper()
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("terminal says %q, want %q", lines.Text(), want)
		}
	}
	expect("24 80")
	expect("/dev/pts/0")
	raw, err := console.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 132})
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := console.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	expect("typed") // the terminal's echo
	expect("50 132")
	expect("got typed")
	if code, err := s.Wait(ctx); code != 5 || err != nil {
		t.Errorf("exit %d, %v", code, err)
	}
	if _, err := console.Read(make([]byte, 10)); !errors.Is(err, unix.EIO) {
		t.Errorf("read after the end: %v, want EIO: nobody else may hold the terminal", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestAGivenUpExecIsKilledWithAllItsProcesses(t *testing.T) {
	n := newNode(t)
	n.idle("c1")
	n.create("shared", pidNamespace(sh("sleep 1000"), ""))
	n.start("shared")
	for _, id := range []string{"c1", "shared"} {
		for name, giveUp := range map[string]func(*ctr.ExecSession, context.CancelFunc) error{
			"close":  func(s *ctr.ExecSession, _ context.CancelFunc) error { return s.Close() },
			"cancel": func(s *ctr.ExecSession, cancel context.CancelFunc) error { cancel(); return nil },
		} {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			r, w := pipe(t)
			// A child, an orphan of the same session, and a child in a session of its own.
			s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: id, Streams: ctr.Streams{Stdout: w},
				Process: process("/bin/sh", "-c", "sleep 1501 & (sleep 1502 &); setsid sleep 1503 & echo up; sleep 1504")})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "all four run", func() bool { return running("sleep 150") >= 4 })
			if err := giveUp(s, cancel); err != nil {
				t.Fatal(err)
			}
			if name == "close" && running("sleep 150") > 0 {
				t.Errorf("%s %s: left when Close has returned:\n%s", id, name, processes())
			}
			eventually(t, "all are dead", func() bool { return running("sleep 150") == 0 })
			if got := readAll(t, r); got != "up\n" {
				t.Errorf("output %q", got)
			}
			if name == "cancel" {
				if _, err := s.Wait(context.Background()); !errors.Is(err, context.Canceled) {
					t.Errorf("wait: %v", err)
				}
				_ = s.Close()
			}
		}
		if !n.state(id).Running() {
			t.Errorf("%s was killed too", id)
		}
	}
}

func TestWhatAnExecLeavesInTheBackgroundGoesOn(t *testing.T) {
	n := newNode(t)
	n.idle("c1")
	if code := n.execCode("c1", "/bin/sh", "-c", "sleep 1601 &"); code != 0 {
		t.Fatalf("exit %d", code)
	}
	eventually(t, "the background process runs", func() bool { return running("sleep 1601") > 0 })
	time.Sleep(50 * time.Millisecond)
	if running("sleep 1601") == 0 {
		t.Error("the background process is gone")
	}
	n.delete("c1")
	if running("sleep 1601") > 0 {
		t.Error("the background process has outlived the container")
	}
}

func TestExecsEndWithTheirContainer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	for _, pid := range []string{"own", "shared"} {
		s := sh("sleep 1000")
		if pid == "shared" {
			s = pidNamespace(s, "")
		}
		n.create(pid, s)
		n.start(pid)
		var sessions []*ctr.ExecSession
		for range 4 {
			e, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: pid, Process: process("sleep", "1000")})
			if err != nil {
				t.Fatal(err)
			}
			sessions = append(sessions, e)
		}
		n.delete(pid)
		for _, e := range sessions {
			if code, err := e.Wait(ctx); code != 137 || err != nil {
				t.Errorf("%s: exit %d, %v", pid, code, err)
			}
			_ = e.Close()
		}
	}
}

func TestExecsRaceWithTheEndOfTheirContainer(t *testing.T) {
	n := newNode(t)
	for i := range 10 {
		id := fmt.Sprintf("c%d", i)
		s := sh("sleep 1000")
		if i%2 == 1 {
			s = pidNamespace(s, "")
		}
		n.create(id, s)
		n.start(id)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for {
					e, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: id, Process: process("sleep", "1000")})
					if err != nil {
						if !errors.Is(err, ctr.ErrNotRunning) && !errors.Is(err, ctr.ErrNotFound) {
							t.Errorf("exec: %v", err)
						}
						return
					}
					defer e.Close()
				}
			})
		}
		time.Sleep(time.Duration(i*3) * time.Millisecond)
		n.delete(id)
		wg.Wait()
		if running("sleep 1000") > 0 {
			t.Fatalf("left:\n%s", processes())
		}
	}
}
