package keeper_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/keeper"
	"github.com/coracle-cri/coracle/ctr/wire"
)

func TestTheDaemonIsStartedAgainAndContainersGoOn(t *testing.T) {
	starts := filepath.Join(base, "starts")
	t.Cleanup(func() { _ = os.Remove(starts) })
	t.Setenv("DAEMON_SEES", "the keeper's environment")
	n := newNode(t, "/bin/sh", "-c", fmt.Sprintf(`echo $$ "$DAEMON_SEES" >> %s; trap 'echo stopped >> %s; exit 0' TERM; while :; do sleep 0.02; done`, starts, starts))
	lines := func() []string {
		raw, _ := os.ReadFile(starts)
		return strings.Split(strings.TrimSpace(string(raw)), "\n")
	}
	n.create("c1", sh("i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"))
	n.start("c1")
	for i := 1; i <= 3; i++ {
		eventually(t, fmt.Sprintf("start %d", i), func() bool { return len(lines()) == i && lines()[i-1] != "" })
		first, rest, _ := strings.Cut(lines()[i-1], " ")
		if rest != "the keeper's environment" {
			t.Fatalf("the daemon sees %q", rest)
		}
		pid, err := strconv.Atoi(first)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "start 4", func() bool { return len(lines()) == 4 })
	if !n.state("c1").Running() {
		t.Error("the container has not lived on")
	}
	logged := len(n.lines("c1"))
	eventually(t, "the log goes on", func() bool { return len(n.lines("c1")) > logged })
	n.end()
	if got := lines(); got[len(got)-1] != "stopped" {
		t.Errorf("the daemon was not asked to stop: %q", got)
	}
	if s := strings.Count(n.log.String(), "the daemon has ended"); s != 3 {
		t.Errorf("%d ends in the keeper's log", s)
	}
}

func TestADaemonThatCannotStartDoesNotStopTheKeeper(t *testing.T) {
	n := newNode(t, "/nowhere/daemon")
	eventually(t, "it is said", func() bool { return strings.Count(n.log.String(), "/nowhere/daemon") >= 2 })
	if s := n.run("c1", sh("exit 2")); s.ExitCode != 2 {
		t.Errorf("%+v", s)
	}
}

func TestShutdownKillsAllAndTheNextKeeperKnowsTheEnds(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.run("done", sh("exit 3"))
	n.create("runs", sh("sleep 1000"))
	n.start("runs")
	n.create("created", sh("true"))
	before, err := n.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the socket is gone", func() bool { return !exists(filepath.Join(n.dir, keeper.SocketName)) })
	n.end()
	next := openNode(t, n.dir)
	defer next.end()
	info, err := next.Info(ctx)
	if err != nil || info.BootID == before.BootID {
		t.Errorf("info %+v, %v", info, err)
	}
	for id, code := range map[string]int{"done": 3, "runs": 137, "created": 137} {
		if s := next.state(id); s.ExitCode != code || !s.Exited() || s.Error != "" {
			t.Errorf("%s: %+v", id, s)
		}
		if _, err := next.Exec(ctx, ctr.ExecRequest{ContainerID: id, Process: process("true")}); !errors.Is(err, ctr.ErrNotRunning) {
			t.Errorf("exec in %s: %v", id, err)
		}
		if err := next.Kill(ctx, id, syscall.SIGKILL, true); err != nil {
			t.Errorf("kill of %s: %v", id, err)
		}
		next.delete(id)
	}
	if left, _ := filepath.Glob(n.dir + "/keeper/*.json"); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// separateNode runs a keeper as a process of its own; kill ends it as a node ends.
func separateNode(t *testing.T, daemon ...string) (other *node, kill func()) {
	t.Helper()
	n := newNode(t)
	n.end() // two keepers in one process would reap each other's children
	dir := filepath.Join(n.dir, "other")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	said, err := os.Create(filepath.Join(n.dir, "keeper.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	cmd := exec.Command("/proc/self/exe", append([]string{dir}, daemon...)...)
	cmd.Env = append(os.Environ(), roleEnv+"=keeper")
	cmd.Stderr = said
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS} // as on a node: its end is theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if raw, err := os.ReadFile(said.Name()); t.Failed() && err == nil {
			t.Logf("the other keeper's log:\n%s", raw)
		}
	})
	t.Cleanup(kill)
	other = &node{Client: ctr.NewClient(filepath.Join(dir, keeper.SocketName)), t: t, dir: dir, runtime: runtimeOfTests}
	// The socket's file is there before anybody listens on it: bind(2) makes it.
	eventually(t, "it answers", func() bool { _, err := other.Info(context.Background()); return err == nil })
	return other, kill
}

func TestAKilledKeeperLeavesNoLieOnDisk(t *testing.T) {
	other, kill := separateNode(t)
	dir := other.dir
	other.create("runs", sh("sleep 1000"))
	other.start("runs")
	other.run("done", sh("exit 3"))
	kill()
	for _, id := range []string{"runs", "done"} { // where there is cgroup2; on a node its tree goes with it
		eventually(t, "nobody is in its cgroup", func() bool {
			err := os.Remove("/sys/fs/cgroup/" + id)
			return err == nil || !errors.Is(err, unix.EBUSY)
		})
	}
	next := openNode(t, dir)
	defer next.end()
	if s := next.state("done"); s.ExitCode != 3 || s.Error != "" {
		t.Errorf("done: %+v", s)
	}
	if s := next.state("runs"); s.ExitCode != 255 || !s.Exited() || !strings.Contains(s.Error, "lost") {
		t.Errorf("runs: %+v", s)
	}
	next.run("again", sh("true"))
	for _, id := range []string{"done", "runs", "again"} {
		next.delete(id)
	}
}

func TestMalformedCallsAreAnswered(t *testing.T) {
	n := newNode(t)
	frame := func(body string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	}
	for name, raw := range map[string][]byte{
		"not JSON":      frame("{"),
		"too long":      {0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		"cut off":       {0, 0, 1, 0, '{'},
		"half a length": {0, 0},
		"unknown call":  frame(`{"op":"frobnicate"}`),
		"no body":       frame(`{"op":"create","id":"x"}`),
		"null spec":     frame(`{"op":"create","id":"x","create":{"spec":{}}}`),
		"no signal":     frame(`{"op":"kill","id":"x"}`),
		"no process":    frame(`{"op":"exec","id":"x"}`),
		"no stream":     frame(`{"op":"attach","id":"x","streams":{"stdin":true}}`),
		"wrong type":    frame(`{"op":"list","since":"x"}`),
	} {
		conn, err := net.Dial("unix", filepath.Join(n.dir, keeper.SocketName))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(raw); err != nil {
			t.Fatal(err)
		}
		_ = conn.(*net.UnixConn).CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		reply, err := io.ReadAll(conn)
		if err != nil && !errors.Is(err, unix.ECONNRESET) || !bytes.Contains(reply, []byte(`"error"`)) {
			t.Errorf("%s: %q, %v", name, reply, err)
		}
		conn.Close()
	}
	if s := n.run("c1", sh("exit 1")); s.ExitCode != 1 {
		t.Errorf("%+v", s)
	}
}

func TestDescriptorsThatDoNotFitAreRefusedAndClosed(t *testing.T) {
	n := newNode(t)
	n.idle("c1")
	for _, streams := range []wire.Streams{{}, {Stdin: true, Stdout: true}} {
		u, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(n.dir, keeper.SocketName)})
		if err != nil {
			t.Fatal(err)
		}
		conn := wire.NewConn(u)
		r, w := pipe(t)
		if err := conn.Write(wire.Request{Op: wire.OpAttach, ID: "c1", Streams: streams}, w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		var reply wire.Reply
		if _, err := conn.Read(&reply); err != nil || reply.Error == nil || !errors.Is(reply.Error, wire.ErrBadRequest) {
			t.Errorf("%+v: %+v, %v", streams, reply, err)
		}
		if got := readAll(t, r); got != "" { // returns only when the keeper has closed it
			t.Errorf("read %q", got)
		}
		conn.Close()
	}
}

func TestAPanicStaysInItsCall(t *testing.T) {
	n := newNode(t)
	keeper.SetPanicHandler(t, "panic")
	u, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(n.dir, keeper.SocketName)})
	if err != nil {
		t.Fatal(err)
	}
	conn := wire.NewConn(u)
	defer conn.Close()
	if err := conn.Write(wire.Request{Op: "panic"}); err != nil {
		t.Fatal(err)
	}
	var reply wire.Reply
	if _, err := conn.Read(&reply); err != nil || reply.Error == nil || !strings.Contains(reply.Error.Message, "mistake") {
		t.Errorf("%+v, %v", reply, err)
	}
	if !strings.Contains(n.log.String(), "panic in a call") {
		t.Errorf("log %s", n.log)
	}
	n.run("c1", sh("true"))
}

func TestOtherUsersAreRefused(t *testing.T) {
	n := newNode(t)
	socket := filepath.Join(n.dir, keeper.SocketName)
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	// Even one who gets past the file modes.
	if err := errors.Join(os.Chmod(socket, 0o666), os.Chmod(n.dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.dir, "stranger")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, socket)
	cmd.Env = append(os.Environ(), roleEnv+"=stranger")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "uid 1000 may not") {
		t.Errorf("%v: %s", err, out)
	}
}
