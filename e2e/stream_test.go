package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// TestStreamTransports: exec, attach and port-forward by each transport that crictl has, from outside of the node, and
// from inside, where a kubelet would be.
func TestStreamTransports(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	n := newHome(t).up("default")
	n.crictl("pull", image)
	pod, podFile := n.runPod("streams", nil)
	server := n.start(pod, podFile, "server", image, nil)
	for _, transport := range []string{"spdy", "websocket"} {
		x := &transported{node: n, transport: transport, pod: pod, podFile: podFile, image: image, server: server}
		for _, step := range []struct {
			name string
			do   func(t *testing.T)
		}{{"exec", x.exec}, {"exec inside the node", x.execInside}, {"exec in a terminal", x.execTerminal},
			{"attach", x.attach}, {"port-forward", x.portForward}} {
			t.Run(transport+" "+step.name, func(t *testing.T) {
				n.t = t
				step.do(t)
			})
			n.t = t
		}
	}
	n.crictl("rmp", "--force", pod)
	n.down()
}

type transported struct {
	*node
	transport, pod, podFile, image, server string
}

func (x *transported) exec(t *testing.T) {
	r := x.try("exec", "--transport", x.transport, x.server, "sh", "-c", "echo out; echo told >&2; exit 3")
	if r.code == 0 || r.out != "out\n" || !strings.Contains(r.errs, "told\n") || !strings.Contains(r.errs, "exit code 3") {
		t.Errorf("a command that ends with 3: exit code %d, %q, %q", r.code, r.out, r.errs)
	}
	if r := x.try("exec", "--transport", x.transport, x.server, "no-such-program"); r.code == 0 || !strings.Contains(r.errs, "no-such-program") {
		t.Errorf("a program that is not there: exit code %d, %q, %q", r.code, r.out, r.errs)
	}
	// Standard input to its end, and the output whole: more than any buffer holds.
	const size = 16 << 20
	cmd := x.crictlCommand("exec", "-i", "--transport", x.transport, x.server, "cat")
	cmd.Stdin = io.LimitReader(zeros{}, size)
	if out, err := cmd.Output(); err != nil || len(out) != size {
		t.Errorf("exec -i cat: %d bytes of %d came back, %v", len(out), size, err)
	}
	// A client that dies takes its command along.
	cmd = x.crictlCommand("exec", "--transport", x.transport, x.server, "sleep", "4321")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the command runs", func() error { return x.runs("sleep 4321", true) })
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	eventually(t, 10*time.Second, "the command is killed", func() error { return x.runs("sleep 4321", false) })
}

// runs tells whether a command is among the processes of the container.
func (x *transported) runs(command string, want bool) error {
	if ps := x.node.exec(x.server, "ps"); strings.Contains(ps, command) != want {
		return fmt.Errorf("ps shows:\n%s", ps)
	}
	return nil
}

func (x *transported) execInside(t *testing.T) {
	r := x.coracle("enter", "--", "env", "CONTAINER_RUNTIME_ENDPOINT="+x.endpoint, "CRI_CONFIG_FILE="+x.crictlConfig(),
		crictlBin, "exec", "--transport", x.transport, x.server, "hostname")
	if r.code != 0 || r.out != "streams\n" {
		t.Errorf("exit code %d, %q, %q", r.code, r.out, r.errs)
	}
}

func (x *transported) execTerminal(t *testing.T) {
	term := newTerminal(t, x.crictlCommand("exec", "-it", "--transport", x.transport, x.server, "/bin/sh"), 31, 97)
	term.await(`[#$] `)
	for _, size := range []string{"31 97", "42 123"} {
		eventually(t, 10*time.Second, "the size is seen inside", func() error {
			term.typeIn("echo now $(stty size)\n")
			if got := term.await(`now \d+ \d+`); got != "now "+size {
				return fmt.Errorf("stty says %q, not %q", got, size)
			}
			return nil
		})
		term.resize(42, 123)
	}
	term.typeIn("exit 5\n")
	if code := term.exitCode(); code == 0 {
		t.Errorf("exit code %d\n%s", code, term.text())
	}
}

func (x *transported) attach(t *testing.T) {
	// A terminal has no size until somebody sets one, and stty calls that an error.
	id := x.start(x.pod, x.podFile, "asks-"+x.transport, x.image, object{"stdin": true, "tty": true,
		"command": []string{"/bin/sh", "-c", `while read -p 'name? ' name; do [ "$name" = end ] && exit 4; echo "hello, $name, $(stty size 2>/dev/null || echo 0 0)"; done`}})
	for i := range 2 {
		// Who goes leaves the container as it is, for the next.
		term := newTerminal(t, x.crictlCommand("attach", "-it", "--transport", x.transport, id), 20, 70)
		size := fmt.Sprintf("2%d 7%d", i+1, i+1)
		term.resize(uint16(21+i), uint16(71+i))
		eventually(t, 10*time.Second, "the new size is seen inside", func() error {
			term.typeIn("ann\n")
			// A shell that a resize interrupts while it reads what stty says takes it for nothing.
			if got := term.await(`hello, ann, [^\r\n]*[\r\n]`); !strings.HasSuffix(strings.TrimSpace(got), size) {
				return fmt.Errorf("it says %q", got)
			}
			return nil
		})
		_ = term.cmd.Process.Kill()
		_ = term.cmd.Wait()
		if state := x.inspect("inspect", id).text("state"); state != "CONTAINER_RUNNING" {
			t.Fatalf("after the client has gone: %s", state)
		}
	}
	x.crictl("stop", "--timeout", "0", id)

	// Without a terminal stdin has an end, which stdin_once passes on, and stderr is apart.
	id = x.start(x.pod, x.podFile, "counts-"+x.transport, x.image, shell("wc -c; echo told >&2; exit 9").with("stdin", true).with("stdin_once", true))
	cmd := x.crictlCommand("attach", "-i", "--transport", x.transport, id)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = io.LimitReader(zeros{}, 1<<20), &out, &errs
	if err := cmd.Run(); err != nil || strings.TrimSpace(out.String()) != "1048576" || errs.String() != "told\n" {
		t.Errorf("attach -i: %v, %q, %q", err, out.String(), errs.String())
	}
	if code := x.inspect("inspect", id).text("exitCode"); code != "9" {
		t.Errorf("exit code %s", code)
	}
}

// forward starts a port-forward and returns the local port.
func (x *transported) forward(t *testing.T, port string, errs io.Writer) (local string, cmd *exec.Cmd) {
	t.Helper()
	cmd = x.crictlCommand("port-forward", "--transport", x.transport, x.pod, "0:"+port)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	found := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindStringSubmatch(line)
	if found == nil {
		_ = cmd.Process.Kill()
		t.Fatalf("crictl port-forward: %q, %v, %v", line, err, cmd.Wait())
	}
	return found[1], cmd
}

func (x *transported) portForward(t *testing.T) {
	x.node.exec(x.server, "sh", "-c", "[ -e /www/large ] || head -c 8000000 /dev/zero >/www/large")
	local, cmd := x.forward(t, "8080", io.Discard)
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if body, err := get(&client, "http://127.0.0.1:"+local+"/"); err != nil || body != "hello from a coracle\n" {
				t.Errorf("through the port-forward: %q, %v", body, err)
			}
		})
		wg.Go(func() {
			if body, err := get(&client, "http://127.0.0.1:"+local+"/large"); err != nil || len(body) != 8000000 {
				t.Errorf("through the port-forward: %d bytes, %v", len(body), err)
			}
		})
	}
	wg.Wait()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()

	// kubectl and crictl end at the first connection that cannot be made; they say why.
	var errs bytes.Buffer
	local, cmd = x.forward(t, "8099", &errs)
	if _, err := get(&client, "http://127.0.0.1:"+local+"/"); err == nil {
		t.Error("an answer from a port where nobody listens")
	}
	_ = cmd.Wait()
	if got := errs.String(); !strings.Contains(got, "port 8099 of pod "+x.pod+": nothing listens there") {
		t.Errorf("crictl says: %s", got)
	}
}
