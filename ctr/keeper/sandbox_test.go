package keeper_test

import (
	"bufio"
	"context"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr"
)

// sandboxRuntime is a program whose containers live in the sandbox of their pod's first one: the one in this binary, or
// gVisor's, where its path is given:
//
//	CORACLE_TEST_RUNSC=/usr/local/bin/runsc go test -run Sandbox ./ctr/keeper
func sandboxRuntime(t *testing.T) ctr.Runtime {
	t.Helper()
	if path := os.Getenv("CORACLE_TEST_RUNSC"); path != "" {
		// The root filesystem of the tests is shared by containers, which gVisor's overlay does not take.
		return ctr.Runtime{Path: path, Args: []string{"--ignore-cgroups", "--network=none", "--overlay2=none"}}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return ctr.Runtime{Path: self, Args: []string{sandboxesArg}}
}

func annotated(s *specs.Spec, kind string) *specs.Spec {
	s.Annotations = map[string]string{"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod"}
	return s
}

func TestContainersLiveInASandbox(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	rt, member := sandboxRuntime(t), sandboxRuntime(t)
	member.Sandbox = "pod"
	inPod := func(r *ctr.CreateRequest) { r.Runtime = &member; r.Spec = annotated(r.Spec, "container") }
	n.create("pod", annotated(spec("sleep", "1000"), "sandbox"), func(r *ctr.CreateRequest) { r.Runtime = &rt })
	n.start("pod")

	if s := n.run("short", sh("echo out; echo err >&2; exit 7"), inPod); s.ExitCode != 7 {
		t.Errorf("exit %+v", s)
	}
	lines := n.lines("short")
	if slices.Sort(lines); strings.Join(lines, "|") != "stderr F err|stdout F out" {
		t.Errorf("log %q", lines)
	}
	n.create("traps", sh("trap 'exit 43' TERM; echo ready; while :; do sleep 0.05; done"), inPod)
	n.start("traps")
	eventually(t, "the trap is set", func() bool { return len(n.lines("traps")) == 1 })
	if err := n.Kill(ctx, "traps", syscall.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if s := n.exit("traps"); s.ExitCode != 43 {
		t.Errorf("exit %+v", s)
	}

	long := sh("sleep 1000")
	for _, id := range []string{"created", "deleted", "killed", "left"} {
		n.create(id, long, inPod)
		if id != "created" {
			n.start(id)
		}
	}
	n.delete("created")
	n.delete("deleted")
	if err := n.Kill(ctx, "killed", syscall.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if s := n.exit("killed"); s.ExitCode != 137 {
		t.Errorf("exit %+v", s)
	}
	n.delete("pod")
	if s := n.exit("left"); s.ExitCode != 255 {
		t.Errorf("a container whose sandbox was killed: %+v", s)
	}
}

func TestExecInASandbox(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	rt, member := sandboxRuntime(t), sandboxRuntime(t)
	member.Sandbox = "pod"
	n.create("pod", annotated(spec("sleep", "1000"), "sandbox"), func(r *ctr.CreateRequest) { r.Runtime = &rt })
	n.start("pod")
	n.create("c1", annotated(sh("sleep 1000"), "container"), func(r *ctr.CreateRequest) { r.Runtime = &member })
	n.start("c1")
	if code := n.execCode("c1", "/bin/sh", "-c", "exit 9"); code != 9 {
		t.Errorf("exit %d", code)
	}
	r, w := pipe(t)
	e, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: process("/bin/sh", "-c", "echo up; exec sleep 777"), Streams: ctr.Streams{Stdout: w}})
	if err != nil {
		t.Fatal(err)
	}
	out := bufio.NewScanner(r)
	if !out.Scan() || out.Text() != "up" {
		t.Fatalf("output %q", out.Text())
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if out.Scan() { // returns when the process in the sandbox, the last to have the pipe, is dead
		t.Errorf("output %q", out.Text())
	}
	n.delete("c1")
	n.delete("pod")
}

// TestAnEndBeforeTheKillIsTheProcesssOwn: what the program finds dead already keeps its exit code.
func TestAnEndBeforeTheKillIsTheProcesssOwn(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	rt := ctr.Runtime{Path: self, Args: []string{sandboxesArg, "--late"}}
	member := rt
	member.Sandbox = "pod"
	n.create("pod", annotated(spec("sleep", "1000"), "sandbox"), func(r *ctr.CreateRequest) { r.Runtime = &rt })
	n.start("pod")
	script := "trap 'exit 43' USR1; echo ready; while :; do sleep 0.05; done"
	n.create("c1", annotated(sh(script), "container"), func(r *ctr.CreateRequest) { r.Runtime = &member })
	n.start("c1")
	eventually(t, "the trap is set", func() bool { return len(n.lines("c1")) == 1 })
	r, w := pipe(t)
	e, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: process("/bin/sh", "-c", script), Streams: ctr.Streams{Stdout: w}})
	if err != nil {
		t.Fatal(err)
	}
	if out := bufio.NewScanner(r); !out.Scan() {
		t.Fatal("no output")
	}
	if err := e.Close(); err != nil { // kills it
		t.Error(err)
	}
	if err := n.Kill(ctx, "c1", syscall.SIGKILL, true); err != nil {
		t.Error(err)
	}
	if s := n.exit("c1"); s.ExitCode != 43 {
		t.Errorf("exit %+v", s)
	}
	n.delete("c1")
	n.delete("pod")
}
