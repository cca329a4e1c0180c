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

// process finds a process of the node by its program's name.
func (n *node) process(program string) int {
	n.t.Helper()
	for pid := range n.trace().pids {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if name, _, _ := strings.Cut(string(args), "\x00"); err == nil && filepath.Base(name) == program {
			return pid
		}
	}
	n.t.Fatalf("the node has no %s", program)
	return 0
}

// first is the host's pid of the node's PID 1.
func (n *node) first() int {
	n.t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.runtimeDir(), "rk", "child_pid"))
	if err != nil {
		n.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		n.t.Fatal(err)
	}
	return pid
}

// die kills processes of the node, and waits until the node is dead.
func (n *node) die(pids ...int) {
	n.t.Helper()
	n.traces = n.trace()
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL) // one that goes with another is gone already
	}
	select {
	case <-n.ended:
	case <-time.After(20 * time.Second):
		n.t.Fatal("coracle up does not end")
	}
	n.hangUp()
}

// TestNodeDeath kills a node in each way in which it can die. The next `up` clears what the kernel did not, and tells the
// truth: nothing runs, what had ended before keeps its end, what ran is said to have ended with the node; images stay,
// and logs are as they were.
func TestNodeDeath(t *testing.T) {
	for _, death := range []struct {
		name string
		kill func(n *node)
		wipe bool // XDG_RUNTIME_DIR is empty again, as after the machine's boot
	}{
		{"parent", func(n *node) { n.die(n.cmd.Process.Pid) }, false},
		{"first process", func(n *node) { n.die(n.first()) }, false},
		{"keeper", func(n *node) { n.die(n.process("coracle-keeper")) }, false},
		{"daemon and then the keeper", func(n *node) {
			signal(n.t, n.daemon(), syscall.SIGSTOP) // it sees nothing any more
			if err := os.Remove(n.path("work", "flag", "wait")); err != nil {
				n.t.Fatal(err)
			}
			eventually(n.t, 10*time.Second, "the keeper has recorded the end", func() error { return n.recorded(7) })
			n.die(n.process("coracle-keeper"))
		}, false},
		{"machine", func(n *node) {
			var all []int
			for pid := range n.trace().pids {
				all = append(all, pid)
			}
			n.die(all...)
		}, true},
	} {
		t.Run(death.name, func(t *testing.T) {
			n, image := upWithBusybox(t, "default")
			d := &deadNode{node: n, image: image, missed: death.name == "daemon and then the keeper"}
			d.populate()
			death.kill(n)
			if death.wipe {
				if err := os.RemoveAll(n.runtimeDir()); err != nil {
					t.Fatal(err)
				}
			}
			d.comeBack()
		})
	}
}

// recorded tells whether the keeper has written down an end with that code.
func (n *node) recorded(code int) error {
	files, err := filepath.Glob(filepath.Join(n.runtimeDir(), "keeper", "*.json"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if raw, _ := os.ReadFile(file); strings.Contains(string(raw), fmt.Sprintf(`"exitCode":%d`, code)) {
			return nil
		}
	}
	return fmt.Errorf("no record has exit code %d", code)
}

type deadNode struct {
	*node
	image                 string
	missed                bool // the daemon did not see the end of "late"
	pod, done, runs, late string
	finished, started     string
}

func (d *deadNode) populate() {
	d.t.Helper()
	var file string
	d.pod, file = d.runPod("a", nil)
	d.done = d.start(d.pod, file, "done", d.image, shell("echo bye; exit 4"))
	d.runs = d.start(d.pod, file, "runs", d.image, shell("i=0; while :; do i=$((i+1)); echo $i; usleep 1000; done"))
	flag := d.mkdir("work", "flag")
	d.writeAt(flag+"/wait", "")
	d.late = d.start(d.pod, file, "late", d.image, shell("while [ -e /flag/wait ]; do usleep 2000; done; exit 7").
		with("mounts", []object{{"host_path": flag, "container_path": "/flag"}}))
	eventually(d.t, 10*time.Second, "the end of the first", func() error {
		if s := d.inspect("inspect", d.done).text("state"); s != "CONTAINER_EXITED" {
			return fmt.Errorf("it is %s", s)
		}
		return nil
	})
	d.finished, d.started = d.inspect("inspect", d.done).text("finishedAt"), d.inspect("inspect", d.runs).text("startedAt")
}

// logOf is the log of a container of the pod, as it is on disk.
func (d *deadNode) logOf(name string) string {
	d.t.Helper()
	raw, err := os.ReadFile(filepath.Join(d.path("work", "logs-default-a"), name+".log"))
	if err != nil {
		d.t.Fatal(err)
	}
	return string(raw)
}

func (d *deadNode) comeBack() {
	d.t.Helper()
	t := d.t
	before := d.logOf("runs")
	n := d.home.up("default")
	d.node = n
	if out := n.crictl("images"); !strings.Contains(out, "tests/busybox") {
		t.Errorf("the images did not stay:\n%s", out)
	}
	if s := n.inspect("inspectp", d.pod); s.text("state") != "SANDBOX_NOTREADY" {
		t.Errorf("pod: %v", s)
	}
	if s := n.inspect("inspect", d.done); s.text("state") != "CONTAINER_EXITED" || s.text("exitCode") != "4" || s.text("reason") != "Error" ||
		s.text("finishedAt") != d.finished {
		t.Errorf("what had ended at %s: %v", d.finished, s)
	}
	d.expectLost(d.runs)
	if s := n.inspect("inspect", d.runs).text("startedAt"); s != d.started {
		t.Errorf("what ran was started at %s, was at %s", s, d.started)
	}
	if !d.missed {
		d.expectLost(d.late)
	} else if s := n.inspect("inspect", d.late); s.text("exitCode") != "7" || s.text("reason") != "Error" {
		t.Errorf("what had ended without the daemon: %v", s)
	}
	d.expectLogs(before)
	n.crictl("rmp", "--all", "--force")
	for _, l := range glob(t, n.dataDir(), "pods/*", "containers/*", "history/*", "images/rootfs/*") {
		t.Errorf("left behind by rmp: %s", l)
	}
	n.down()
}

func (d *deadNode) expectLost(id string) {
	d.t.Helper()
	if s := d.inspect("inspect", id); s.text("state") != "CONTAINER_EXITED" || s.text("exitCode") != "137" || s.text("reason") != "ContainerStatusUnknown" ||
		!strings.Contains(s.text("message"), "the node that it ran on ended") {
		d.t.Errorf("what ran: %v", s)
	}
}

// expectLogs: the log of what ran ends where the node died, and what takes its place logs to a file of its own.
func (d *deadNode) expectLogs(before string) {
	d.t.Helper()
	t := d.t
	next := 1
	for line := range strings.Lines(before) {
		f := strings.Fields(line)
		if len(f) != 4 || f[2] != "F" || f[3] != strconv.Itoa(next) {
			t.Fatalf("the log has %q where %d was to come", line, next)
		}
		next++
	}
	if next < 10 {
		t.Errorf("the log has %d lines", next-1)
	}
	if log := d.logOf("done"); strings.Count(log, "bye") != 1 {
		t.Errorf("the log of what had ended: %q", log)
	}
	pod, file := d.runPod("a", object{"metadata": object{"name": "a", "namespace": "e2e", "uid": "uid-a", "attempt": 1}})
	again := d.start(pod, file, "runs", d.image, shell("echo again").with("log_path", "runs-1.log"))
	eventually(t, 10*time.Second, "the next one logs", func() error {
		if log := d.crictl("logs", again); log != "again" {
			return fmt.Errorf("%q", log)
		}
		return nil
	})
	if now := d.logOf("runs"); now != before {
		t.Errorf("the log had %d bytes and has %d", len(before), len(now))
	}
}
