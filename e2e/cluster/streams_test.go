package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/creack/pty"
)

func TestLogs(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("counts", "for i in 1 2 3 4 5; do echo line $i; echo to stderr $i >&2; sleep 1; done", "  restartPolicy: Never"))
	s.eventually("the pod runs", func() error { _, err := s.try("logs", "counts"); return err })
	followed := s.kubectl("logs", "-f", "counts") // ends with the container
	want(t, followed, "line 1\n", "line 5\n", "to stderr 5\n")
	if got := s.kubectl("logs", "counts", "--tail=2", "--timestamps"); len(strings.Split(strings.TrimSpace(got), "\n")) != 2 || !strings.HasPrefix(got, "20") {
		t.Errorf("the last two lines with times are:\n%s", got)
	}

	// One that crashes: what the container before said is kept, and the kubelet backs off.
	s.apply(pod("crashes", "echo about to crash; sleep 1; exit 7", ""))
	s.eventually("the pod backs off", func() error {
		if got := s.get("pod/crashes", "{.status.containerStatuses[0].state.waiting.reason}"); got != "CrashLoopBackOff" {
			return fmt.Errorf("its reason is %q", got)
		}
		return nil
	})
	want(t, s.kubectl("logs", "--previous", "crashes"), "about to crash")
	if got := s.get("pod/crashes", "{.status.containerStatuses[0].lastState.terminated.exitCode} {.status.containerStatuses[0].lastState.terminated.reason}"); got != "7 Error" {
		t.Errorf("the container ended with %q, want 7 Error", got)
	}
	s.eventually("it is started again", func() error {
		if got := s.get("pod/crashes", "{.status.containerStatuses[0].restartCount}"); got == "0" {
			return errors.New("it was not restarted")
		}
		return nil
	})
}

func TestExec(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("shell", "trap 'exit 0' TERM; while :; do sleep 1; done", ""))
	s.ready("shell")
	if got := s.exec("shell", "echo out; echo err >&2"); got != "out\n" {
		t.Errorf("standard output is %q", got)
	}
	if _, err := s.try("exec", "shell", "--", "sh", "-c", "exit 42"); err == nil || !strings.Contains(err.Error(), "exit code 42") {
		t.Errorf("exit code 42 is told as: %v", err)
	}
	large := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	if got, err := tryInput(large, "-n", s.name, "exec", "-i", "shell", "--", "cat"); err != nil || got != large {
		t.Errorf("1 MiB through cat: %d bytes come back, %v", len(got), err)
	}

	// A terminal: the shell in the container sees one of the size of this one, and the words come back.
	cmd := command(context.Background(), "-n", s.name, "exec", "-it", "shell", "--", "sh")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 111})
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	seen := collect(tty)
	if _, err := tty.WriteString("tty; stty size; exit 5\n"); err != nil {
		t.Fatal(err)
	}
	err = cmd.Wait()
	if cmd.ProcessState.ExitCode() != 5 {
		t.Errorf("kubectl exec -it ends with %v, want exit code 5", err)
	}
	want(t, seen(), "/dev/pts/", "33 111")
}

// collect reads until the end and returns what there was, when that is asked for.
func collect(r io.Reader) func() string {
	var (
		buf  bytes.Buffer
		done = make(chan struct{})
	)
	go func() {
		defer close(done)
		_, _ = io.Copy(&buf, r) // a terminal ends with EIO
	}()
	return func() string {
		<-done
		return buf.String()
	}
}

func TestCopy(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("files", "sleep 1000", ""))
	s.ready("files")
	dir := t.TempDir()
	content := bytes.Repeat([]byte("some bytes\x00\xff\n"), 100_000)
	if err := os.MkdirAll(filepath.Join(dir, "in", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "in", "sub", "file"), content, 0o640); err != nil {
		t.Fatal(err)
	}
	s.kubectl("cp", filepath.Join(dir, "in"), "files:/tmp/there")
	s.kubectl("cp", "files:/tmp/there", filepath.Join(dir, "back"))
	if got, err := os.ReadFile(filepath.Join(dir, "back", "sub", "file")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file has %d bytes of %d when it comes back, %v", len(got), len(content), err)
	}
}

func TestAttach(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("reads", "while read line; do echo got $line; done; sleep 1000", "") + "    stdin: true\n    stdinOnce: false\n")
	s.ready("reads")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := command(ctx, "-n", s.name, "attach", "-i", "reads")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, io.Discard
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.eventually("what is typed comes back", func() error {
		// A line that is written before the stream stands is kept by kubectl; one is enough, more do no harm.
		if _, err := io.WriteString(stdin, "a word\n"); err != nil {
			return err
		}
		if !strings.Contains(out.String(), "got a word") {
			return fmt.Errorf("there is %q", out.String())
		}
		return nil
	})
	cancel()
	_ = cmd.Wait()
}

// lockedBuffer may be read while a program writes.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:(\d+)`)

// TestPortForward: over WebSocket, which kubectl takes by itself, and over SPDY.
func TestPortForward(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("serves", "exec httpd -f -p 8080 -h /www", ""))
	s.ready("serves")
	for _, over := range []string{"WebSocket", "SPDY"} {
		t.Run(over, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			cmd := command(ctx, "-n", s.name, "port-forward", "pod/serves", ":8080", "-v=6")
			cmd.Env = append(cmd.Env[:len(cmd.Env):len(cmd.Env)], fmt.Sprintf("KUBECTL_PORT_FORWARD_WEBSOCKETS=%t", over == "WebSocket"))
			var out lockedBuffer
			cmd.Stdout, cmd.Stderr = &out, &out
			cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { cancel(); _ = cmd.Wait() }()
			var port string
			eventually(t, "kubectl listens", func() error {
				found := forwarding.FindStringSubmatch(out.String())
				if found == nil {
					return fmt.Errorf("it says: %s", out.String())
				}
				port = found[1]
				return nil
			})
			tunnelled := strings.Contains(out.String(), "negotiated protocol: portforward.k8s.io") // inside a WebSocket
			if tunnelled != (over == "WebSocket") || strings.Contains(out.String(), "fallback to secondary dialer") {
				t.Errorf("the connection is not by %s; kubectl says:\n%s", over, out.String())
			}
			for range 3 {
				if answer, err := fetch(port); err != nil || !strings.Contains(answer, "coracle") {
					t.Errorf("the forwarded port answers %q, %v; kubectl says:\n%s", answer, err, out.String())
				}
			}
		})
	}
}

// TestDebug: an ephemeral container sees the processes of the container that it is aimed at.
func TestDebug(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("target", "exec sleep 54321", ""))
	s.ready("target")
	s.kubectl("debug", "target", "--image", the.busybox, "--target", "main", "--container", "probe", "--profile", "general", "--", "sh", "-c", "ps; echo seen; sleep 1000")
	s.eventually("the ephemeral container has run", func() error {
		out, err := s.try("logs", "target", "-c", "probe")
		if err == nil && !strings.Contains(out, "seen") {
			err = fmt.Errorf("it has said %q", out)
		}
		return err
	})
	want(t, s.kubectl("logs", "target", "-c", "probe"), "sleep 54321")
}

// TestServiceProxy: the API server reaches pods and services by their addresses.
func TestServiceProxy(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("serves", "exec httpd -f -p 8080 -h /www", "") + "    ports: [{containerPort: 8080}]\n")
	s.ready("serves")
	want(t, kubectl(t, "get", "--raw", "/api/v1/namespaces/"+s.name+"/pods/serves:8080/proxy/"), "coracle")
}
