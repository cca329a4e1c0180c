package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	ossignal "os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// busy gives a node something of everything that could be left behind: pods on the network, one with a published
// port, one in the node's network, one with a shared pid namespace; a terminal, an exec, a port-forward in progress.
func (n *node) busy(image string, hostPort int) {
	n.t.Helper()
	pod, file := n.runPod("a", object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": hostPort},
		{"protocol": 1, "container_port": 5353, "host_port": hostPort}}})
	id := n.start(pod, file, "web", image, object{"mounts": []object{{"host_path": n.path("work"), "container_path": "/made"}}})
	n.start(pod, file, "tty", image, object{"tty": true, "stdin": true, "command": []string{"/bin/sh"}})
	other, otherFile := n.runPod("b", object{"linux": object{"security_context": object{"namespace_options": object{"network": 2, "pid": 0}}}})
	n.start(other, otherFile, "orphans", image, shell("(sleep 1000 & exec sleep 1000) & (trap '' TERM; sleep 1000) & wait"))
	for _, args := range [][]string{{"exec", "-i", id, "sleep", "1000"}, {"port-forward", pod, "0:8080"}, {"logs", "-f", id}} {
		cmd := n.crictlCommand(args...)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			n.t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			n.t.Fatal(err)
		}
		n.clients = append(n.clients, func() { stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(n.t, 10*time.Second, "the published port answers", func() error {
		_, err := get(client, fmt.Sprintf("http://127.0.0.1:%d/", hostPort))
		return err
	})
	eventually(n.t, 5*time.Second, "the exec runs", func() error {
		if ps := n.exec(id, "ps"); !strings.Contains(ps, "sleep 1000") {
			return fmt.Errorf("ps shows:\n%s", ps)
		}
		return nil
	})
}

func expectPortFree(t *testing.T, port int) {
	t.Helper()
	l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
	if err != nil {
		t.Errorf("the published port is still taken: %v", err)
		return
	}
	l.Close()
}

// expectUsableAgain starts the node once more: its images are there, what is left of the pods of before is shown as
// not ready and can be removed, and then the disk holds nothing of them.
func expectUsableAgain(t *testing.T, h *home, image string) {
	t.Helper()
	n := h.up("default")
	if out := n.crictl("images"); !strings.Contains(out, "tests/busybox") {
		t.Errorf("the images did not stay:\n%s", out)
	}
	if out := n.crictl("pods", "-q", "--state", "Ready"); out != "" {
		t.Errorf("pods of the node's earlier life are ready: %s", out)
	}
	if out := n.crictl("ps", "-q"); out != "" {
		t.Errorf("containers of the node's earlier life run: %s", out)
	}
	n.crictl("rmp", "--all", "--force")
	for _, l := range glob(t, n.dataDir(), "pods/*", "containers/*", "history/*", "images/rootfs/*") {
		t.Errorf("left behind by rmp: %s", l)
	}
	pod, file := n.runPod("a", nil)
	id := n.start(pod, file, "web", image, nil)
	if out := n.exec(id, "cat", "/www/index.html"); !strings.Contains(out, "hello") {
		t.Errorf("the image that stayed: %q", out)
	}
	n.down()
}

// expectAllSeen holds the list of what is left against a node that is up: a list that does not see what is there
// proves nothing when it is empty.
func (n *node) expectAllSeen() {
	n.t.Helper()
	n.traces = n.trace()
	list := strings.Join(append(n.leftInKernel(), n.leftOnDisk()...), "\n")
	wanted := []string{"coracle up", "slirp4netns", "coracle-keeper", "coracle daemon", "process .* by its environment", "(?m)^process .*httpd", "namespace net:", "namespace pid:", "namespace mnt:",
		"mount in the namespace .*/pods/.*/ns/net", "mount in the namespace .*/merged", "listening socket tcp6? .*:4718", "listening socket udp6? .*:4718",
		"unix socket .*coracle.sock", "file .*coracle.sock"}
	if len(n.before.cgroups) > 0 { // there is a delegated subtree
		wanted = append(wanted, "cgroup .*/coracle-default")
	}
	for _, w := range wanted {
		if !regexp.MustCompile(w).MatchString(list) {
			n.t.Errorf("the list of what is there does not show %q:\n%s", w, list)
		}
	}
}

func TestDownLeavesNothing(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	n.busy(image, 18200)
	n.expectAllSeen()
	n.down("--grace", "1s")
	expectPortFree(t, 18200)
	expectUsableAgain(t, n.home, image)
}

// TestKilledParentLeavesNothing kills the outermost process, as the kernel or a user's `kill -9` would: the kernel's
// things go at once, and `coracle down` takes the files away.
func TestKilledParentLeavesNothing(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	n.busy(image, 18201)
	n.traces = n.trace()
	if len(n.traces.pids) < 10 || len(n.traces.namespaces) < 5 {
		t.Errorf("only %d processes and %d namespaces were found: the list is not whole", len(n.traces.pids), len(n.traces.namespaces))
	}
	n.kill()
	// The kernel's things; a directory in the cgroup tree is a file, in this.
	eventually(t, 3*time.Second, "what is the kernel's goes by itself", func() error {
		for _, l := range n.leftInKernel() {
			if !strings.HasPrefix(l, "cgroup ") && !strings.HasPrefix(l, "unix socket ") {
				return fmt.Errorf("left: %s", l)
			}
		}
		return nil
	})
	expectPortFree(t, 18201)
	if r := n.coracle("status"); r.code == 0 || !strings.Contains(r.errs, "not up") {
		t.Errorf("coracle status of a killed node: exit code %d, %s%s", r.code, r.out, r.errs)
	}
	if r := n.coracle("down"); r.code != 0 {
		t.Errorf("coracle down of a killed node: exit code %d, %s%s", r.code, r.out, r.errs)
	}
	n.expectNothingLeft(time.Second)
	expectUsableAgain(t, n.home, image)
}

// TestUpAfterKill: the next up needs no down in between.
func TestUpAfterKill(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	n.busy(image, 18202)
	n.kill()
	expectUsableAgain(t, n.home, image)
	n.expectNothingLeft(time.Second)
}

// TestInterrupt: a foreground node is a program of the user's terminal, which Ctrl-C and the terminal's end end with
// everything.
func TestInterrupt(t *testing.T) {
	if ossignal.Ignored(syscall.SIGHUP) { // the tests run by nohup, and so would the node, which then goes on after a hangup
		caught := make(chan os.Signal, 1)
		ossignal.Notify(caught, syscall.SIGHUP)
		defer ossignal.Stop(caught)
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			n, image := upWithBusybox(t, "default")
			n.busy(image, 18203)
			n.traces = n.trace()
			if err := n.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			select {
			case <-n.ended:
			case <-time.After(20 * time.Second):
				t.Fatal("coracle up does not end")
			}
			n.hangUp()
			n.expectNothingLeft(2 * time.Second)
		})
	}
}

func TestDetach(t *testing.T) {
	h := newHome(t)
	r := h.coracle("up", "--detach")
	found := readyLine.FindStringSubmatch(r.out)
	if r.code != 0 || found == nil {
		t.Fatalf("coracle up --detach: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	defer h.coracle("down", "--grace", "0s")
	n := &node{home: h, name: "default", endpoint: found[1], ended: make(chan struct{}), log: filepath.Join(h.path("data"), "coracle", "node.log")}
	if out := n.crictl("version"); !strings.Contains(out, "coracle") {
		t.Errorf("crictl version:\n%s", out)
	}
	if r := h.coracle("up", "--detach"); r.code == 0 || !strings.Contains(r.errs, "up already") {
		t.Errorf("a second coracle up: exit code %d, %s%s", r.code, r.out, r.errs)
	}
	if r := h.coracle("up"); r.code == 0 || !strings.Contains(r.errs, "up already") {
		t.Errorf("a second coracle up in the foreground: exit code %d, %s%s", r.code, r.out, r.errs)
	}
	if r := h.coracle("down"); r.code != 0 {
		t.Errorf("coracle down: exit code %d, %s%s", r.code, r.out, r.errs)
	}
	n.expectNothingLeft(2 * time.Second)
	if r := h.coracle("down"); r.code != 0 {
		t.Errorf("coracle down of a node that is not up: exit code %d, %s%s", r.code, r.out, r.errs)
	}
}

// signal sends a signal to a process of the node, as the host sees it.
func signal(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatalf("signal %d to process %d: %v", sig, pid, err)
	}
}

// TestDownUnderSignals: a node that is told to end, and told again until it has, ends well. Its signals go to its PID 1 and
// on to the keeper, at any moment of their end.
func TestDownUnderSignals(t *testing.T) {
	h := newHome(t)
	for range 5 {
		n := h.up("default")
		for deadline := time.Now().Add(30 * time.Second); !n.dead(); {
			if time.Now().After(deadline) {
				t.Fatal("coracle up does not end")
			}
			_ = n.cmd.Process.Signal(syscall.SIGTERM) // it may have ended at this very moment
			time.Sleep(time.Millisecond)
		}
		if code := n.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("coracle up: %v\n%s", n.cmd.ProcessState, tail(n.logged(), 5))
		}
		n.expectNothingLeft(2 * time.Second)
	}
}
