package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// daemon is the host's pid of the node's daemon.
func (n *node) daemon() int {
	n.t.Helper()
	for pid := range n.trace().pids {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		words := strings.Split(string(args), "\x00")
		if len(words) > 1 && filepath.Base(words[0]) == "coracle" && words[1] == "daemon" {
			return pid
		}
	}
	n.t.Fatal("the node has no daemon")
	return 0
}

// TestKilledDaemon kills the daemon while containers run: they run on, their logs go on without a gap, the exit code
// of one that ends meanwhile is right, and exec works again within a second.
func TestKilledDaemon(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("stays", object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": 18210}}})
	counts := n.start(pod, file, "counts", image, shell("i=0; while :; do i=$((i+1)); echo $i; usleep 5000; done"))
	n.start(pod, file, "web", image, nil)
	flag := n.mkdir("work", "flag")
	n.writeAt(flag+"/wait", "")
	ends := n.start(pod, file, "ends", image, shell("while [ -e /flag/wait ]; do usleep 2000; done; echo last words; exit 7").
		with("mounts", []object{{"host_path": flag, "container_path": "/flag"}}))
	ip := n.podIP(pod)
	pidBefore := n.exec(counts, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22")

	for round := range 3 {
		old := n.daemon()
		signal(t, old, syscall.SIGKILL)
		killed := time.Now()
		if round == 1 { // the daemon was not up for long: the keeper starts another one not before 100 ms have gone
			if err := os.Remove(flag + "/wait"); err != nil {
				t.Fatal(err)
			}
		}
		for {
			r := n.try("exec", counts, "echo", "alive")
			if r.code == 0 && strings.Contains(r.out, "alive") {
				break
			}
			if time.Since(killed) > 10*time.Second {
				t.Fatalf("exec does not work again: %s", r.errs)
			}
		}
		took := time.Since(killed)
		t.Logf("exec works %s after SIGKILL of the daemon", took.Round(time.Millisecond))
		// The back-off doubles with each death; the promise is about the first.
		if round == 0 && took > time.Second {
			t.Errorf("exec works only %s after SIGKILL of the daemon, want a second at most", took)
		}
		if now := n.daemon(); now == old {
			t.Errorf("the daemon is still process %d", old)
		}
	}
	if status := n.inspect("inspect", ends); status.text("exitCode") != "7" || status.text("state") != "CONTAINER_EXITED" || status.text("reason") != "Error" {
		t.Errorf("the container that ended meanwhile: state %s, exit code %s, reason %s", status.text("state"), status.text("exitCode"), status.text("reason"))
	}
	if log := n.crictl("logs", ends); log != "last words" {
		t.Errorf("its log: %q", log)
	}
	if status := n.inspect("inspect", counts); status.text("state") != "CONTAINER_RUNNING" {
		t.Errorf("the container that ran on: %v", status)
	}
	if now := n.exec(counts, "sh", "-c", "cat /proc/1/stat | cut -d' ' -f22"); now != pidBefore {
		t.Errorf("the container was started anew: %s, %s", pidBefore, now)
	}
	lines := strings.Fields(n.crictl("logs", counts))
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("the log has a gap: line %d is %q", i+1, line)
		}
	}
	if got := n.podIP(pod); got != ip {
		t.Errorf("the pod's address was %s and is %s", ip, got)
	}
	if r := n.command(nil, "curl", "-fsS", "--max-time", "5", "http://127.0.0.1:18210/"); !strings.Contains(r.out, "hello") {
		t.Errorf("the published port: exit code %d %s", r.code, r.errs)
	}

	// What was begun under the first daemon is ended under the fourth.
	n.crictl("stopp", pod)
	n.crictl("rmp", pod)
	for _, l := range glob(t, n.dataDir(), "pods/*", "containers/*", "images/rootfs/*") {
		t.Errorf("left behind by rmp: %s", l)
	}
	expectPortFree(t, 18210)
	n.down()
}
