package keeper_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/ctr"
)

// self is this test binary's path, of which a keeper that is to be replaced executes a copy.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// replace replaces the keeper of a separate node by the same program.
func (n *node) replace() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := n.ReplaceKeeper(ctx, self(n.t)); err != nil {
		n.t.Fatal(err)
	}
}

// release lets go of what waits for the file.
func release(t *testing.T, file string) {
	t.Helper()
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestAReplacedKeeperKeepsEverything replaces a keeper while containers are in every state that there is, and goes on with
// each of them.
func TestAReplacedKeeperKeepsEverything(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	ctx := context.Background()
	before, err := n.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	counts := n.create("counts", sh("i=0; while :; do i=$((i+1)); echo $i; echo e$i >&2; done"))
	n.start("counts")
	n.create("waits", sh("echo -n half; read x; echo -n \" $x\"; read x; echo \" and $x\"; exit 7"), func(r *ctr.CreateRequest) { r.Stdin, r.StdinOnce = true, true })
	n.start("waits")
	n.create("tty", sh("read x; echo got $x; exit 4"), func(r *ctr.CreateRequest) { r.Stdin, r.TTY = true, true })
	n.start("tty")
	n.create("created", sh("exit 5"))
	if s := n.run("done", sh("echo bye; exit 3")); s.ExitCode != 3 {
		t.Fatalf("%+v", s)
	}
	r, w := pipe(t)
	inR, inW := pipe(t)
	session, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "counts", Process: process("sh", "-c", "read x; echo told $x; exit 9"),
		Streams: ctr.Streams{Stdin: inR, Stdout: w}})
	if err != nil {
		t.Fatal(err)
	}
	a := n.attach("waits")
	if _, err := a.in.WriteString("a\n"); err != nil {
		t.Fatal(err)
	}
	// What comes out of the attach has passed the log, where it is half a line.
	a.out.Split(bufio.ScanBytes)
	if !a.out.Scan() {
		t.Fatal("nothing comes out of the attach")
	}

	for range 3 {
		n.replace()
	}
	if err := <-a.done; err == nil || !strings.Contains(err.Error(), "attach again") {
		t.Errorf("the attach ended with %v", err)
	}
	after, err := n.Info(ctx)
	if err != nil || after.BootID != before.BootID || after.Pid != before.Pid || after.Seq < before.Seq {
		t.Errorf("keeper %+v has become %+v, %v", before, after, err)
	}
	if s := n.state("counts"); !s.Running() || s.Pid != counts.Pid || s.PidStart != counts.PidStart {
		t.Errorf("counts: %+v", s)
	}
	if _, err := inW.WriteString("you\n"); err != nil {
		t.Fatal(err)
	}
	if out := readAll(t, r); out != "told you\n" {
		t.Errorf("the exec said %q", out)
	}
	if code, err := session.Wait(ctx); code != 9 || err != nil {
		t.Errorf("the exec ended with %d, %v", code, err)
	}
	n.say("waits", "whole")
	n.say("tty", "me")
	for id, code := range map[string]int{"waits": 7, "tty": 4, "created": 5, "done": 3} {
		if id == "created" {
			n.start(id)
		}
		if id != "done" {
			n.exit(id)
		}
		if s := n.state(id); s.ExitCode != code || s.Error != "" {
			t.Errorf("%s: %+v", id, s)
		}
	}
	for id, want := range map[string]string{"waits": "stdout F half a and whole", "tty": "stdout F me\r,stdout F got me\r", "done": "stdout F bye"} {
		if got := strings.Join(n.lines(id), ","); got != want {
			t.Errorf("log of %s: %q, want %q", id, got, want)
		}
	}
	if code := n.execCode("counts", "sh", "-c", "exit 6"); code != 6 {
		t.Errorf("an exec by the new keeper: %d", code)
	}
	n.endAndDelete("counts")
	for _, id := range []string{"waits", "tty", "created", "done"} {
		n.delete(id)
	}
	if left, _ := filepath.Glob(n.dir + "/keeper/*.json"); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// say attaches to a container and types a line.
func (n *node) say(id, word string) {
	n.t.Helper()
	inR, inW := pipe(n.t)
	_, outW := pipe(n.t)
	done := make(chan error, 1)
	go func() { done <- n.Attach(context.Background(), id, ctr.Streams{Stdin: inR, Stdout: outW}) }()
	if _, err := inW.WriteString(word + "\n"); err != nil {
		n.t.Fatal(err)
	}
	if err := <-done; err != nil {
		n.t.Errorf("attach to %s: %v", id, err)
	}
}

// gapless holds the lines of a container that counts on both streams to what it must have written.
func gapless(t *testing.T, lines []string) {
	t.Helper()
	next := map[string]int{"stdout": 1, "stderr": 1}
	for i, line := range lines {
		f := strings.Fields(line)
		if len(f) != 3 || f[1] == "P" && i < len(lines)-2 || f[1] == "F" && strings.TrimPrefix(f[2], "e") != strconv.Itoa(next[f[0]]) {
			t.Fatalf("line %d is %q, and %v were to come", i, line, next)
		}
		next[f[0]]++
	}
	if next["stdout"] < 100 {
		t.Errorf("only %v", next)
	}
}

// TestContainersThatEndWhileTheKeeperIsReplaced ends containers all the while: none of their codes is lost or wrong.
func TestContainersThatEndWhileTheKeeperIsReplaced(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	const rounds = 8
	ends := make(chan error, 1)
	go func() {
		for i := range 4 * rounds {
			id := fmt.Sprintf("c%d", i)
			if _, err := n.Create(context.Background(), ctr.CreateRequest{ID: id, Spec: sh(fmt.Sprintf("echo %d; exit %d", i, i+1)), LogPath: n.logPath(id)}); err != nil {
				ends <- fmt.Errorf("create %s: %w", id, err)
				return
			}
			if _, err := n.Start(context.Background(), id); err != nil {
				ends <- fmt.Errorf("start %s: %w", id, err)
				return
			}
		}
		ends <- nil
	}()
	for range rounds {
		n.replace()
	}
	if err := <-ends; err != nil {
		t.Fatal(err)
	}
	for i := range 4 * rounds {
		id := fmt.Sprintf("c%d", i)
		eventually(t, "the end of "+id, func() bool { return n.state(id).Exited() })
		if s := n.state(id); s.ExitCode != i+1 || s.Error != "" {
			t.Errorf("%+v", s)
		}
		if got, want := n.lines(id), "stdout F "+strconv.Itoa(i); len(got) != 1 || got[0] != want {
			t.Errorf("log of %s: %q", id, got)
		}
		n.delete(id)
	}
}

// TestAKeeperThatCannotTakeOver tries programs that are of no use: the keeper goes on, and says what is wrong.
func TestAKeeperThatCannotTakeOver(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	ctx := context.Background()
	n.create("c1", sh("while :; do sleep 1; done"))
	n.start("c1")
	a := n.attach("c1")
	defer a.cancel()
	before := n.state("c1")
	script := func(name, text string) string {
		path := filepath.Join(n.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	whole, err := os.ReadFile(self(t))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		n.dir + "/nowhere":                                                  "no such file",
		script("noise", "\x7fELF no program"):                               "exec format error",
		script("cut", string(whole[:len(whole)/3])):                         "does not take over",
		script("newer", "#!/bin/sh\necho the state is too old >&2; exit 1"): "the state is too old",
		"relative/path":                                                     "not absolute",
	} {
		if _, err := n.ReplaceKeeper(ctx, path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if s := n.state("c1"); s != before {
		t.Errorf("%+v has become %+v", before, s)
	}
	select {
	case err := <-a.done:
		t.Errorf("the attach was ended: %v", err)
	default:
	}
	n.delete("c1")
}

// TestAKeeperThatFailsInTakingOverGoesBack: this one says that it can take over, and cannot.
func TestAKeeperThatFailsInTakingOverGoesBack(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	ctx := context.Background()
	n.create("c1", sh("i=0; while :; do i=$((i+1)); echo $i; echo e$i >&2; done"))
	n.start("c1")
	n.create("c2", sh("exit 1"))
	release(t, filepath.Join(n.dir, failOnce))
	if _, err := n.ReplaceKeeper(ctx, self(t)); err == nil || !strings.Contains(err.Error(), "on purpose") || !strings.Contains(err.Error(), "the keeper of before goes on") {
		t.Errorf("the replacement ended with %v", err)
	}
	n.start("c2")
	if s := n.exit("c2"); s.ExitCode != 1 {
		t.Errorf("%+v", s)
	}
	n.replace()
	n.endAndDelete("c1")
	n.delete("c2")
}

// endAndDelete ends a container that counts.
func (n *node) endAndDelete(id string) {
	n.t.Helper()
	if err := n.Kill(context.Background(), id, syscall.SIGKILL, true); err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, "its end is known", func() bool { return n.state(id).Exited() })
	gapless(n.t, n.lines(id))
	n.delete(id)
}

// TestDamagedStateOfAContainerDoesNotStopTheReplacement: the container runs on, and says what cannot be done with it.
func TestDamagedStateOfAContainerDoesNotStopTheReplacement(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	n.create("c1", sh("i=0; while :; do i=$((i+1)); echo $i; echo e$i >&2; done"))
	n.start("c1")
	state := filepath.Join(n.dir, "keeper/lc/c1/state.json")
	if err := os.WriteFile(state, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(n.dir, "keeper/c1.json") // of which there is no more to be had
	if err := errors.Join(os.Remove(record), os.MkdirAll(filepath.Join(record, "inside"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.replace()
	}
	if !n.state("c1").Running() {
		t.Errorf("%+v", n.state("c1"))
	}
	if _, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: "c1", Process: process("true")}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("exec: %v", err)
	}
	n.endAndDelete("c1")
	if left, _ := filepath.Glob(n.dir + "/keeper/*/c1*"); len(left) != 0 || exists(record) {
		t.Errorf("left %v", left)
	}
}

// TestTheDaemonIsExchanged swaps the daemon's program for another, and for some that are of no use.
func TestTheDaemonIsExchanged(t *testing.T) {
	dir := t.TempDir()
	starts := filepath.Join(dir, "starts")
	daemon := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.Symlink(self(t), path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	n := newNode(t, daemon("one"), daemonArg, starts)
	ctx := context.Background()
	seen := func(want string) {
		t.Helper()
		eventually(t, "the daemons are "+want, func() bool {
			raw, _ := os.ReadFile(starts)
			return strings.Join(strings.Fields(string(raw)), " ") == want
		})
	}
	seen("one")
	if err := n.RestartDaemon(ctx, daemon("two")); err != nil {
		t.Fatal(err)
	}
	seen("one two")
	if err := n.RestartDaemon(ctx, daemon("bad")); err == nil || !strings.Contains(err.Error(), "configuration is wrong") ||
		!strings.Contains(err.Error(), "runs again") {
		t.Errorf("a daemon that does not serve: %v", err)
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("\x7fELF no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := n.RestartDaemon(ctx, broken); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("a daemon that is no program: %v", err)
	}
	seen("one two bad two")
	if err := n.RestartDaemon(ctx, daemon("three")); err != nil {
		t.Fatal(err)
	}
	seen("one two bad two three")
}

// daemonArg makes this binary a daemon that notes its start in a file and serves, unless it is called "bad".
const daemonArg = "a-daemon"

func runDaemon(starts string) error {
	name := filepath.Base(os.Args[0])
	f, err := os.OpenFile(starts, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(f, name); err != nil {
		return err
	}
	said := ctr.ReadyServing
	if name == "bad" {
		said = "the configuration is wrong"
	}
	if _, err := fmt.Fprintln(os.NewFile(3, "ready"), said); err != nil {
		return err
	}
	time.Sleep(time.Hour)
	return nil
}

// TestTheSandboxesOfAReplacedKeeperGoOn: members of a sandbox have stand-ins, which pass on like other children.
func TestTheSandboxesOfAReplacedKeeperGoOn(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	ctx := context.Background()
	rt, member := sandboxRuntime(t), sandboxRuntime(t)
	member.Sandbox = "pod"
	inPod := func(r *ctr.CreateRequest) { r.Runtime = &member; r.Spec = annotated(r.Spec, "container") }
	n.create("pod", annotated(spec("sleep", "1000"), "sandbox"), func(r *ctr.CreateRequest) { r.Runtime = &rt })
	n.start("pod")
	n.create("traps", sh("trap 'exit 43' TERM; echo ready; while :; do sleep 0.05; done"), inPod)
	n.start("traps")
	eventually(t, "the trap is set", func() bool { return len(n.lines("traps")) == 1 })
	n.create("early", sh("exit 1"), inPod)
	if _, err := n.ReplaceKeeper(ctx, self(t)); err == nil || !strings.Contains(err.Error(), "early is just being started") {
		t.Errorf("while a container waits for its start: %v", err)
	}
	n.start("early")
	n.exit("early")
	n.replace()
	if err := n.Kill(ctx, "traps", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if s := n.exit("traps"); s.ExitCode != 43 {
		t.Errorf("exit %+v", s)
	}
	if s := n.run("later", sh("exit 8"), inPod); s.ExitCode != 8 {
		t.Errorf("exit %+v", s)
	}
	for _, id := range []string{"traps", "early", "later", "pod"} {
		n.delete(id)
	}
}
