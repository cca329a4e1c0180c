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
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// remote is a way in which clients speak exec and attach.
type remote struct {
	name      string
	halfClose bool // the client can end stdin alone
	executor  func(config *rest.Config, u *url.URL) (remotecommand.Executor, error)
}

var remotes = []remote{
	{"SPDY", true, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
	}},
	{"WebSocket v5", true, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(config, http.MethodGet, u.String())
	}},
	{"WebSocket v4", false, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(config, http.MethodGet, u.String(), "v4.channel.k8s.io")
	}},
}

// eachRemote runs fn for each of them, on a node of its own.
func eachRemote(t *testing.T, fn func(t *testing.T, h *harness, r remote)) {
	for _, r := range remotes {
		t.Run(r.name, func(t *testing.T) { fn(t, newHarness(t), r) })
	}
}

// stream runs a client against a streaming URL.
func (r remote) stream(ctx context.Context, raw string, options remotecommand.StreamOptions) error {
	u, err := url.Parse(raw)
	if err != nil {
		return err
	}
	executor, err := r.executor(&rest.Config{Host: u.Host}, u)
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, options)
}

// start runs a client beside the test.
func (r remote) start(ctx context.Context, raw string, options remotecommand.StreamOptions) <-chan error {
	result := make(chan error, 1)
	go func() { result <- r.stream(ctx, raw, options) }()
	return result
}

func (h *harness) execURLFor(req *runtimeapi.ExecRequest) string {
	h.t.Helper()
	resp, err := h.Exec(h.ctx(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Url
}

// execScript is the URL of a shell script with the streams that req asks for.
func (h *harness) execScript(id, script string, req *runtimeapi.ExecRequest) string {
	h.t.Helper()
	req.ContainerId, req.Cmd = id, []string{"/bin/sh", "-c", script}
	return h.execURLFor(req)
}

func exitCodeOf(err error) int {
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		return exit.Code
	}
	return 0
}

func TestExecStream(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		count := "head -c 300000 | wc -c"
		if r.halfClose {
			count = "wc -c" // the end of stdin reaches the process
		}
		u := h.execScript(id[:20], count+"; echo err >&2; exit 5", &runtimeapi.ExecRequest{Stdin: true, Stdout: true, Stderr: true})
		if !strings.HasPrefix(u, "http://127.0.0.1:") {
			t.Errorf("url %s", u)
		}
		var out, errOut bytes.Buffer
		err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdin: strings.NewReader(strings.Repeat("x", 300_000)), Stdout: &out, Stderr: &errOut})
		if exitCodeOf(err) != 5 || strings.TrimSpace(out.String()) != "300000" || errOut.String() != "err\n" {
			t.Errorf("%v: %q %q", err, out.String(), errOut.String())
		}
		for _, again := range remotes {
			if err := again.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: io.Discard}); err == nil {
				t.Errorf("%s: a token was good for two uses", again.name)
			}
		}
		u = h.execScript(id, "exit 0", &runtimeapi.ExecRequest{Stdout: true})
		if err := r.stream(h.ctx(), strings.Replace(u, "/exec/", "/attach/", 1), remotecommand.StreamOptions{Stdout: io.Discard}); err == nil {
			t.Error("a token of exec was good for attach")
		}
		u = h.execScript(id, "echo only >&2", &runtimeapi.ExecRequest{Stderr: true})
		errOut.Reset()
		if err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stderr: &errOut}); err != nil || errOut.String() != "only\n" {
			t.Errorf("stderr alone: %v %q", err, errOut.String())
		}
	})
}

// TestExecFails: why it did is told to the client.
func TestExecFails(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		h.keeper.setFailure("exec", errors.New("no such program"))
		u := h.execScript(id, "true", &runtimeapi.ExecRequest{Stdin: true, Stdout: true, Stderr: true})
		err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard})
		if err == nil || !strings.Contains(err.Error(), "exec in container "+id+": no such program") {
			t.Errorf("%v", err)
		}
		h.keeper.setFailure("exec", nil)
		u = h.execScript(id, "true", &runtimeapi.ExecRequest{Stdout: true})
		h.stop(id, 0)
		err = r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: io.Discard})
		if err == nil || !strings.Contains(err.Error(), id) {
			t.Errorf("exec in a container that has ended meanwhile: %v", err)
		}
	})
}

// TestExecMoreStreams: a client that makes streams which were not asked for finds them ended.
func TestExecMoreStreams(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		for _, req := range []*runtimeapi.ExecRequest{{Stdout: true, Stderr: true}, {Stdin: true, Stdout: true}} {
			script := "echo out"
			if req.Stdin {
				script = "read line; echo out" // kubectl sends input once it has all of its streams
			}
			var out, errOut bytes.Buffer
			u := h.execScript(id, script, req)
			err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdin: strings.NewReader("in\n"), Stdout: &out, Stderr: &errOut})
			if err != nil || out.String() != "out\n" || errOut.Len() != 0 {
				t.Errorf("stdin %v: %v %q %q", req.Stdin, err, out.String(), errOut.String())
			}
		}
	})
}

// TestExecSlowClient: all of the output arrives, however late it is read, whether or not the process takes its input.
func TestExecSlowClient(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		const size = 6_000_000
		script := fmt.Sprintf("head -c %d /dev/zero", size)
		var out bytes.Buffer
		u := h.execScript(id, script, &runtimeapi.ExecRequest{Stdout: true})
		if err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: &slowWriter{w: &out}}); err != nil || out.Len() != size {
			t.Errorf("%d bytes of %d, %v", out.Len(), size, err)
		}
		out.Reset()
		u = h.execScript(id, script, &runtimeapi.ExecRequest{Stdin: true, Stdout: true})
		options := remotecommand.StreamOptions{Stdin: endless{}, Stdout: &slowWriter{w: &out}}
		if err := r.stream(h.ctx(), u, options); err != nil || out.Len() != size {
			t.Errorf("with input that is not taken: %d bytes of %d, %v", out.Len(), size, err)
		}
	})
}

// slowWriter is a client that takes its time after the process has ended.
type slowWriter struct {
	w     io.Writer
	count int
}

func (s *slowWriter) Write(p []byte) (int, error) {
	if s.count++; s.count%16 == 0 {
		time.Sleep(20 * time.Millisecond)
	}
	return s.w.Write(p)
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestExecLargeOutput: what passes through is not kept.
func TestExecLargeOutput(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		const size, most = 512 << 20, 128 << 20
		u := h.execScript(id, fmt.Sprintf("head -c %d /dev/zero", size), &runtimeapi.ExecRequest{Stdout: true})
		meter := &memoryMeter{}
		if err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: meter}); err != nil || meter.written != size {
			t.Errorf("%d bytes of %d, %v", meter.written, size, err)
		}
		if meter.most > most {
			t.Errorf("%d MiB of memory for %d MiB of output", meter.most>>20, size>>20)
		}
	})
}

// memoryMeter looks at the heap while it is written to.
type memoryMeter struct {
	written int
	most    uint64
}

func (m *memoryMeter) Write(p []byte) (int, error) {
	if before := m.written >> 23; (m.written+len(p))>>23 > before {
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		m.most = max(m.most, stats.HeapInuse)
	}
	m.written += len(p)
	return len(p), nil
}

// TestExecStuckClient: a client that reads nothing holds up nobody else, and its command ends with it.
func TestExecStuckClient(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		stuck := stuckWriter{writes: make(chan struct{}, 1), free: make(chan struct{})}
		ctx, cancel := context.WithCancel(h.ctx())
		result := r.start(ctx, h.execScript(id, "yes", &runtimeapi.ExecRequest{Stdout: true}), remotecommand.StreamOptions{Stdout: stuck})
		eventually(t, func() bool { return h.keeper.sessions() == 1 })
		var out bytes.Buffer
		u := h.execScript(id, "echo fine", &runtimeapi.ExecRequest{Stdout: true})
		if err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: &out}); err != nil || out.String() != "fine\n" {
			t.Errorf("%v %q", err, out.String())
		}
		<-stuck.writes // a client that is ended before it reads leaves its goroutines behind
		cancel()
		close(stuck.free)
		if err := <-result; err == nil {
			t.Error("no error")
		}
		eventually(t, func() bool { return h.keeper.sessions() == 0 })
	})
}

// stuckWriter tells of its first write, which takes until it is free.
type stuckWriter struct{ writes, free chan struct{} }

func (s stuckWriter) Write(p []byte) (int, error) {
	select {
	case s.writes <- struct{}{}:
	default:
	}
	<-s.free
	return 0, io.ErrClosedPipe
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
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		u := h.execScript(id, `trap 'stty size' WINCH; stty -echo; echo ready; until read line && [ -n "$line" ]; do :; done; echo "got $line"; exit 3`,
			&runtimeapi.ExecRequest{Tty: true, Stdin: true, Stdout: true})
		in, typing := io.Pipe()
		out := &lockedBuffer{}
		size := make(sizes, 2)
		result := r.start(h.ctx(), u, remotecommand.StreamOptions{Stdin: in, Stdout: out, Tty: true, TerminalSizeQueue: size})
		eventually(t, func() bool { return strings.Contains(out.String(), "ready") })
		size <- remotecommand.TerminalSize{Width: 91, Height: 37}
		// The shell runs its trap when read is interrupted, or after it.
		time.Sleep(200 * time.Millisecond)
		fmt.Fprintln(typing, "hello")
		err := <-result
		typing.Close()
		close(size)
		if exitCodeOf(err) != 3 || !strings.Contains(out.String(), "37 91") || !strings.Contains(out.String(), "got hello\r\n") {
			t.Errorf("%v: %q", err, out.String())
		}
	})
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
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		ctx, cancel := context.WithCancel(h.ctx())
		out := &lockedBuffer{}
		in, typing := io.Pipe()
		defer typing.Close()
		u := h.execScript(id, "echo ready; sleep 1000", &runtimeapi.ExecRequest{Stdin: true, Stdout: true})
		result := r.start(ctx, u, remotecommand.StreamOptions{Stdin: in, Stdout: out})
		eventually(t, func() bool { return strings.Contains(out.String(), "ready") })
		cancel()
		if err := <-result; err == nil {
			t.Error("no error")
		}
		eventually(t, func() bool { return h.keeper.sessions() == 0 })
	})
}

// TestClientGoneBehindInput: so does one whose end is behind input that the command does not take, or has closed.
func TestClientGoneBehindInput(t *testing.T) {
	for _, test := range []struct {
		name, script   string
		messages, size int
	}{
		// The pipe takes 64 KiB, those who copy keep some of the rest, and the kernel has room for what is left and the end.
		{"not taken", "sleep 1000", 80, 1 << 10},
		{"closed", "exec 0<&-; sleep 1000", 1000, 32 << 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			id := h.running("sleep 1000")
			u := h.execScript(id, test.script, &runtimeapi.ExecRequest{Stdin: true, Stdout: true})
			dialer := websocket.Dialer{Subprotocols: []string{"v5.channel.k8s.io"}}
			ws, resp, err := dialer.Dial(strings.Replace(u, "http:", "ws:", 1), nil)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			defer ws.Close()
			eventually(t, func() bool { return h.keeper.sessions() == 1 })
			if err := ws.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			for range test.messages {
				if err := ws.WriteMessage(websocket.BinaryMessage, make([]byte, test.size)); err != nil { // to channel 0
					t.Fatal(err)
				}
			}
			if err := ws.NetConn().(*net.TCPConn).CloseWrite(); err != nil {
				t.Error(err)
			}
			eventually(t, func() bool { return h.keeper.sessions() == 0 })
		})
	}
}

func TestAttach(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		pod := h.run(h.podConfig("p"))
		config := shell("c", "while read line; do echo got $line; [ $line = end ] && exit 6; done; exit 7")
		config.Stdin, config.StdinOnce = true, r.halfClose
		id := h.create(pod, config)
		h.start(id)
		attach := func(ctx context.Context, in io.Reader, out io.Writer) <-chan error {
			t.Helper()
			resp, err := h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: id, Stdin: in != nil, Stdout: true})
			if err != nil {
				t.Fatal(err)
			}
			return r.start(ctx, resp.Url, remotecommand.StreamOptions{Stdin: in, Stdout: out})
		}
		watching := &lockedBuffer{}
		ctx, cancel := context.WithCancel(h.ctx())
		watcher := attach(ctx, nil, watching)
		eventually(t, func() bool { return h.keeper.attached() == 1 })
		in, typing := io.Pipe()
		out := &lockedBuffer{}
		result := attach(h.ctx(), in, out)
		fmt.Fprintln(typing, "one")
		eventually(t, func() bool {
			return strings.Contains(out.String(), "got one") && strings.Contains(watching.String(), "got one")
		})
		// Who leaves leaves the container alone.
		cancel()
		if err := <-watcher; err == nil {
			t.Error("no error")
		}
		fmt.Fprintln(typing, "two")
		eventually(t, func() bool { return strings.Contains(out.String(), "got two") })
		want := int32(7)
		if !r.halfClose {
			fmt.Fprintln(typing, "end")
			want = 6
		}
		typing.Close() // stdin_once passes it on
		if err := <-result; err != nil {
			t.Error(err)
		}
		if st := h.exited(id); st.ExitCode != want {
			t.Errorf("%v", st)
		}
	})
}

// TestAttachTerminal: sizes reach the container's terminal.
func TestAttachTerminal(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		config := shell("c", "echo up; sleep 1000")
		config.Tty, config.Stdin = true, true
		id := h.create(h.run(h.podConfig("p")), config)
		h.start(id)
		resp, err := h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: id, Tty: true, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		size := make(sizes, 2)
		in, typing := io.Pipe()
		ctx, cancel := context.WithCancel(h.ctx())
		result := r.start(ctx, resp.Url, remotecommand.StreamOptions{Stdin: in, Stdout: io.Discard, Tty: true, TerminalSizeQueue: size})
		for _, want := range [][2]uint16{{80, 24}, {132, 50}} {
			size <- remotecommand.TerminalSize{Width: want[0], Height: want[1]}
			eventually(t, func() bool { return h.keeper.sizeOf(id) == want })
		}
		close(size)
		cancel()
		if err := <-result; err == nil {
			t.Error("no error")
		}
		typing.Close()
		if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%v", st)
		}
	})
}

// TestCloseEndsStreams: no session outlives the service, each client is told why, and the container goes on.
func TestCloseEndsStreams(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		out := &lockedBuffer{}
		execing := r.start(h.ctx(), h.execScript(id, "echo ready; sleep 1000", &runtimeapi.ExecRequest{Stdout: true}), remotecommand.StreamOptions{Stdout: out})
		resp, err := h.Attach(h.ctx(), &runtimeapi.AttachRequest{ContainerId: id, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		attached := r.start(h.ctx(), resp.Url, remotecommand.StreamOptions{Stdout: out})
		eventually(t, func() bool { return strings.Contains(out.String(), "ready") && h.keeper.attached() == 1 })
		h.restart(nil)
		for what, result := range map[string]<-chan error{"exec": execing, "attach": attached} {
			if err := <-result; err == nil || !strings.Contains(err.Error(), "the daemon is shutting down") {
				t.Errorf("%s: %v", what, err)
			}
		}
		if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%v", st)
		}
	})
}

// TestExecLeaves: what a command leaves in the background does not hold its session up.
func TestExecLeaves(t *testing.T) {
	eachRemote(t, func(t *testing.T, h *harness, r remote) {
		id := h.running("sleep 1000")
		pid := filepath.Join(t.TempDir(), "pid")
		var out bytes.Buffer
		u := h.execScript(id, "sleep 30 & echo $! >"+pid+"; echo done", &runtimeapi.ExecRequest{Stdout: true})
		if err := r.stream(h.ctx(), u, remotecommand.StreamOptions{Stdout: &out}); err != nil || out.String() != "done\n" {
			t.Errorf("%v %q", err, out.String())
		}
		raw, err := os.ReadFile(pid)
		if err != nil {
			t.Fatal(err)
		}
		var left int
		if _, err := fmt.Sscan(string(raw), &left); err != nil {
			t.Fatal(err)
		}
		if p, err := os.FindProcess(left); err != nil || p.Kill() != nil {
			t.Errorf("the background process did not go on: %v", err)
		}
	})
}
