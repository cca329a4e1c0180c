package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/pod/streaming"
)

func (h *harness) running(script string) string {
	return h.launchIn(h.run(h.podConfig("p")), "c", script)
}

func TestExecSync(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	run := func(timeout int64, script string) (*runtimeapi.ExecSyncResponse, error) {
		return h.ExecSync(h.ctx(), &runtimeapi.ExecSyncRequest{ContainerId: id[:16], Cmd: []string{"/bin/sh", "-c", script}, Timeout: timeout})
	}
	resp, err := run(0, "echo out; echo err >&2; exit 9")
	if err != nil || string(resp.Stdout) != "out\n" || string(resp.Stderr) != "err\n" || resp.ExitCode != 9 {
		t.Errorf("%v %v", resp, err)
	}
	resp, err = run(0, fmt.Sprintf("head -c %d /dev/zero; echo end >&2", execSyncLimit+100_000))
	if err != nil || len(resp.Stdout) != execSyncLimit || string(resp.Stderr) != "end\n" {
		t.Errorf("kept %d of too much, %v", len(resp.GetStdout()), err)
	}
	begun := time.Now()
	if resp, err = run(0, "sleep 1000 & echo left"); err != nil || string(resp.Stdout) != "left\n" || time.Since(begun) > 5*time.Second {
		t.Errorf("a background process: %v %v after %s", resp, err, time.Since(begun))
	}
	mark := filepath.Join(t.TempDir(), "mark")
	_, err = run(1, "(sleep 2; touch "+mark+") & wait")
	wantCode(t, err, codes.DeadlineExceeded)
	ctx, cancel := context.WithTimeout(h.ctx(), 200*time.Millisecond)
	defer cancel()
	_, err = h.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/sh", "-c", "(sleep 1; touch " + mark + ") & wait"}})
	wantCode(t, err, codes.DeadlineExceeded)
	time.Sleep(2 * time.Second)
	if _, err := os.Stat(mark); err == nil {
		t.Error("a process outlived its exec's end")
	}
	_, err = h.ExecSync(h.ctx(), &runtimeapi.ExecSyncRequest{ContainerId: id})
	wantCode(t, err, codes.InvalidArgument)
	h.stop(id, 0)
	_, err = run(0, "exit 0")
	wantCode(t, err, codes.FailedPrecondition)
	_, err = h.ReopenContainerLog(h.ctx(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	wantCode(t, err, codes.FailedPrecondition)
}

// TestPanicInExecSync: a defect in the copy of a command's output is the call's error, and ends the command.
func TestPanicInExecSync(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.capture(h.ctx(), c, []string{"/bin/sh", "-c", "while :; do echo x; done"}, panicking{}, &cappedBuffer{max: 10})
	if defect := (*streaming.Defect)(nil); !errors.As(err, &defect) {
		t.Errorf("%v", err)
	}
	if _, err := h.ExecSync(h.ctx(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/true"}}); err != nil {
		t.Errorf("the next call: %v", err)
	}
}

type panicking struct{}

func (panicking) Write([]byte) (int, error) { panic("a test's") }

// TestStreamRequests: what the CRI says of the requests is held, with its codes.
func TestStreamRequests(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 1000")
	created := h.create(pod, shell("created", "sleep 1000"))
	cmd := []string{"true"}
	for _, test := range []struct {
		why                        string
		id                         string
		cmd                        []string
		stdin, stdout, stderr, tty bool
		exec, attach               codes.Code
	}{
		{"all streams", id, cmd, true, true, true, false, codes.OK, codes.OK},
		{"a prefix of the id", id[:12], cmd, false, true, false, false, codes.OK, codes.OK},
		{"a terminal", id, cmd, true, true, false, true, codes.OK, codes.OK},
		{"no command", id, nil, false, true, false, false, codes.InvalidArgument, codes.OK},
		{"no stream", id, cmd, false, false, false, false, codes.InvalidArgument, codes.InvalidArgument},
		{"no stream but a terminal", id, cmd, false, false, false, true, codes.InvalidArgument, codes.InvalidArgument},
		{"a terminal with stderr", id, cmd, true, true, true, true, codes.InvalidArgument, codes.InvalidArgument},
		{"a container that is not there", "nope", cmd, false, true, false, false, codes.NotFound, codes.NotFound},
		{"no id", "", cmd, false, true, false, false, codes.InvalidArgument, codes.InvalidArgument},
		{"a container that does not run", created, cmd, false, true, false, false, codes.FailedPrecondition, codes.FailedPrecondition},
	} {
		_, err := h.Exec(h.ctx(), &runtimeapi.ExecRequest{ContainerId: test.id, Cmd: test.cmd,
			Stdin: test.stdin, Stdout: test.stdout, Stderr: test.stderr, Tty: test.tty})
		t.Logf("exec, %s: %v", test.why, err)
		wantCode(t, err, test.exec)
		_, err = h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: test.id,
			Stdin: test.stdin, Stdout: test.stdout, Stderr: test.stderr, Tty: test.tty})
		t.Logf("attach, %s: %v", test.why, err)
		wantCode(t, err, test.attach)
	}
	for _, test := range []struct {
		id    string
		ports []int32
		want  codes.Code
	}{{pod, nil, codes.OK}, {pod[:8], []int32{80, 65535}, codes.OK}, {pod, []int32{0}, codes.InvalidArgument},
		{pod, []int32{80, 65536}, codes.InvalidArgument}, {"nope", nil, codes.NotFound}} {
		_, err := h.PortForward(h.ctx(), &runtimeapi.PortForwardRequest{PodSandboxId: test.id, Port: test.ports})
		wantCode(t, err, test.want)
	}
	for range 1000 {
		_, err := h.Exec(h.ctx(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: cmd, Stdout: true})
		if err != nil {
			wantCode(t, err, codes.ResourceExhausted)
			return
		}
	}
	t.Error("URLs without end")
}

// TestStreamInNode: the same URL works inside the node's network namespace.
func TestStreamInNode(t *testing.T) {
	h := newHarness(t)
	for _, inside := range []bool{false, true} {
		dial := func() error {
			conn, err := net.Dial("tcp", h.streams.Addr())
			if err != nil {
				return err
			}
			return conn.Close()
		}
		err := dial()
		if inside {
			err = inNetNS(h.network.node, dial)
		}
		if err != nil {
			t.Errorf("inside %v: %v", inside, err)
		}
	}
}
