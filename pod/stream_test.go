package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
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

// stream runs a client against a streaming URL.
func (h *harness) stream(ctx context.Context, raw string, options remotecommand.StreamOptions) error {
	h.t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		h.t.Fatal(err)
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	if err != nil {
		h.t.Fatal(err)
	}
	return executor.StreamWithContext(ctx, options)
}

func (h *harness) execURLFor(req *runtimeapi.ExecRequest) string {
	h.t.Helper()
	resp, err := h.Exec(h.ctx(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Url
}

func TestExecStream(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	var out, errOut bytes.Buffer
	u := h.execURLFor(&runtimeapi.ExecRequest{ContainerId: id[:20], Cmd: []string{"/bin/sh", "-c", "wc -c; echo err >&2; exit 5"}, Stdin: true, Stdout: true, Stderr: true})
	if !strings.HasPrefix(u, "http://127.0.0.1:") {
		t.Errorf("url %s", u)
	}
	// The end of stdin reaches the process, and its exit code the client.
	err := h.stream(h.ctx(), u, remotecommand.StreamOptions{Stdin: strings.NewReader(strings.Repeat("x", 300_000)), Stdout: &out, Stderr: &errOut})
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) || exit.Code != 5 || strings.TrimSpace(out.String()) != "300000" || errOut.String() != "err\n" {
		t.Errorf("%v: %q %q", err, out.String(), errOut.String())
	}
	if err := h.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: io.Discard}); err == nil {
		t.Error("a token was good for two uses")
	}
	out.Reset()
	u = h.execURLFor(&runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"/bin/sh", "-c", "head -c 3000000 /dev/zero"}, Stdout: true})
	if err := h.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: &slowWriter{w: &out}}); err != nil || out.Len() != 3_000_000 {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
	_, err = h.Exec(h.ctx(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"x"}})
	wantCode(t, err, codes.InvalidArgument)
	_, err = h.Exec(h.ctx(), &runtimeapi.ExecRequest{ContainerId: "nope", Cmd: []string{"x"}, Stdout: true})
	wantCode(t, err, codes.NotFound)
}

// slowWriter is a client that takes its time after the process has ended.
type slowWriter struct {
	w     io.Writer
	count int
}

func (s *slowWriter) Write(p []byte) (int, error) {
	if s.count++; s.count%8 == 0 {
		time.Sleep(20 * time.Millisecond)
	}
	return s.w.Write(p)
}

type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func TestExecTerminal(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	u := h.execURLFor(&runtimeapi.ExecRequest{ContainerId: id, Tty: true, Stdin: true, Stdout: true,
		Cmd: []string{"/bin/sh", "-c", `trap 'stty size' WINCH; stty -echo; echo ready; until read line && [ -n "$line" ]; do :; done; echo "got $line"; exit 3`}})
	in, typing := io.Pipe()
	out := &lockedBuffer{}
	size := make(sizes, 2)
	result := make(chan error, 1)
	go func() {
		result <- h.stream(h.ctx(), u, remotecommand.StreamOptions{Stdin: in, Stdout: out, Tty: true, TerminalSizeQueue: size})
	}()
	eventually(t, func() bool { return strings.Contains(out.String(), "ready") })
	size <- remotecommand.TerminalSize{Width: 91, Height: 37}
	// The shell runs its trap when read is interrupted, or after it.
	time.Sleep(200 * time.Millisecond)
	fmt.Fprintln(typing, "hello")
	err := <-result
	typing.Close()
	close(size)
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) || exit.Code != 3 || !strings.Contains(out.String(), "37 91") || !strings.Contains(out.String(), "got hello\r\n") {
		t.Errorf("%v: %q", err, out.String())
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestClientGone: who hangs up takes the command along.
func TestClientGone(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	mark := filepath.Join(t.TempDir(), "mark")
	u := h.execURLFor(&runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"/bin/sh", "-c", "echo ready; sleep 1; touch " + mark}, Stdin: true, Stdout: true})
	ctx, cancel := context.WithCancel(h.ctx())
	out := &lockedBuffer{}
	in, typing := io.Pipe()
	defer typing.Close()
	result := make(chan error, 1)
	go func() { result <- h.stream(ctx, u, remotecommand.StreamOptions{Stdin: in, Stdout: out}) }()
	eventually(t, func() bool { return strings.Contains(out.String(), "ready") })
	cancel()
	if err := <-result; err == nil {
		t.Error("no error")
	}
	time.Sleep(1500 * time.Millisecond)
	if _, err := os.Stat(mark); err == nil {
		t.Error("the command went on")
	}
}

func TestAttach(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("c", "while read line; do echo got $line; done; exit 6")
	config.Stdin, config.StdinOnce = true, true
	id := h.create(pod, config)
	_, err := h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: id, Stdout: true})
	wantCode(t, err, codes.FailedPrecondition)
	h.start(id)
	resp, err := h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: id, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	out := &lockedBuffer{}
	in, typing := io.Pipe()
	result := make(chan error, 1)
	go func() { result <- h.stream(h.ctx(), resp.Url, remotecommand.StreamOptions{Stdin: in, Stdout: out}) }()
	fmt.Fprintln(typing, "one")
	eventually(t, func() bool { return strings.Contains(out.String(), "got one") })
	typing.Close()
	if err := <-result; err != nil {
		t.Error(err)
	}
	if st := h.exited(id); st.ExitCode != 6 {
		t.Errorf("%v", st)
	}
}

func TestPortForward(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	p, err := h.index.pod(pod)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:7777", "[::1]:7778"} {
		listener := h.echoServer(p, address)
		defer listener.Close()
		_, port, _ := net.SplitHostPort(address)
		if got := h.forward(pod, port, "ping"); got != "echo ping" {
			t.Errorf("%s: %q", address, got)
		}
	}
	if got := h.forward(pod, "7779", "ping"); got != "" {
		t.Errorf("nobody listens, and %q came", got)
	}
}

// echoServer answers in the pod's namespace, after the client has ended its half.
func (h *harness) echoServer(p *pod, address string) (l net.Listener) {
	h.t.Helper()
	err := inNetNS(p.nsPath("net"), func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		buf := make([]byte, 64)
		n, _ := conn.Read(buf)
		fmt.Fprintf(conn, "echo %s", buf[:n])
	}()
	return l
}

func (h *harness) forward(pod, port, text string) string {
	h.t.Helper()
	resp, err := h.PortForward(h.ctx(), &runtimeapi.PortForwardRequest{PodSandboxId: pod[:8]})
	if err != nil {
		h.t.Fatal(err)
	}
	u, _ := url.Parse(resp.Url)
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: u.Host})
	if err != nil {
		h.t.Fatal(err)
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u)
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:" + port}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		h.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	defer func() {
		close(stop)
		if err := <-ended; err != nil {
			h.t.Log("forwarder ended:", err)
		}
	}()
	<-ready
	ports, err := forwarder.GetPorts()
	if err != nil {
		h.t.Fatal(err)
	}
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
	if err != nil {
		h.t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	fmt.Fprint(conn, text)
	raw, _ := io.ReadAll(conn)
	return string(raw)
}

// TestCloseEndsStreams: no session outlives the service, and the container does.
func TestCloseEndsStreams(t *testing.T) {
	h := newHarness(t)
	id := h.running("sleep 1000")
	u := h.execURLFor(&runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"/bin/sh", "-c", "echo ready; sleep 1000"}, Stdout: true})
	out := &lockedBuffer{}
	result := make(chan error, 1)
	go func() { result <- h.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: out}) }()
	eventually(t, func() bool { return strings.Contains(out.String(), "ready") })
	h.restart(nil)
	select {
	case err := <-result:
		t.Log("client ended:", err)
	case <-time.After(5 * time.Second):
		t.Error("the client still waits")
	}
	if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%v", st)
	}
}

// TestStreamInNode: the same URL works inside the node's network namespace.
func TestStreamInNode(t *testing.T) {
	h := newHarness(t)
	for _, inside := range []bool{false, true} {
		dial := func() error {
			conn, err := net.Dial("tcp", h.streams.addr)
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
