package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

const mebi = 1 << 20

// limited is a container that runs a script under limits of the CRI.
func limited(script string, resources object) object {
	return shell(script).with("linux", object{"resources": resources})
}

// groupOf is the directory of a container's cgroup, as the node sees it.
func (n *node) groupOf(container string) string {
	n.t.Helper()
	dir := strings.TrimSpace(n.inside("find", "/sys/fs/cgroup", "-type", "d", "-name", container))
	if dir == "" || strings.Contains(dir, "\n") {
		n.t.Fatalf("cgroups of container %s: %q, want one", container, dir)
	}
	return dir
}

// groupFiles reads files of a cgroup, in one command: each costs a second in an emulated machine.
func (n *node) groupFiles(dir string, names ...string) map[string]string {
	n.t.Helper()
	out := map[string]string{}
	script := `cd "$1" || exit; shift; for f; do echo "== $f"; cat "$f"; done`
	for part := range strings.SplitSeq(n.inside(append([]string{"sh", "-c", script, "sh", dir}, names...)...), "== ") {
		if name, content, ok := strings.Cut(part, "\n"); ok {
			out[name] = strings.TrimSpace(content)
		}
	}
	return out
}

// counter is the number behind a key of a flat-keyed file.
func counter(text, key string) int64 {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+" "); ok {
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return -1
			}
			return n
		}
	}
	return -1
}

func (n *node) expectFiles(what, dir string, want map[string]string) {
	n.t.Helper()
	names := make([]string, 0, len(want))
	for name := range want {
		names = append(names, name)
	}
	got := n.groupFiles(dir, names...)
	for name, value := range want {
		if got[name] != value {
			n.t.Errorf("%s: %s is %q, want %q", what, name, got[name], value)
		}
	}
}

// TestLimitFiles: what the CRI asks for stands in the kernel's files, under the kubelet's parent, and an update changes
// it in place. The values are those that a rootful runtime writes. The CRI's limit of swap counts memory and swap together, the
// kernel's swap alone.
func TestLimitFiles(t *testing.T) {
	inVM(t, "memory", "pids")
	n, image := upWithBusybox(t, "default")
	pod, podFile := n.runPod("limits", object{"linux": object{"cgroup_parent": "/kubepods/burstable/poduid-limits"}})
	resources := object{"cpu_shares": 512, "cpu_quota": 50000, "cpu_period": 100000, "cpuset_cpus": "0", "memory_limit_in_bytes": 64 * mebi,
		"memory_swap_limit_in_bytes": 96 * mebi, "unified": object{"memory.high": fmt.Sprint(48 * mebi), "pids.max": "50", "io.weight": "200",
			"memory.oom.group": "1", "memory.low": fmt.Sprint(8 * mebi)}}
	id := n.start(pod, podFile, "limited", image, limited("exec sleep 1000", resources))
	dir := n.groupOf(id)
	if !strings.HasPrefix(dir, "/sys/fs/cgroup/kubepods/burstable/poduid-limits/pod"+pod) {
		t.Errorf("cgroup %s is not below the kubelet's parent", dir)
	}
	want := map[string]string{"memory.max": fmt.Sprint(64 * mebi), "memory.high": fmt.Sprint(48 * mebi), "memory.low": fmt.Sprint(8 * mebi),
		"memory.swap.max": fmt.Sprint(32 * mebi), "memory.oom.group": "1", "pids.max": "50"}
	updated := map[string]string{"memory.max": fmt.Sprint(96 * mebi), "memory.swap.max": "0", "memory.high": fmt.Sprint(48 * mebi), "memory.oom.group": "1", "pids.max": "50"}
	args := []string{"update", "--memory", fmt.Sprint(96 * mebi)}
	if n.hasController("cpu") {
		for name, value := range map[string]string{"cpu.max": "50000 100000", "cpu.weight": weightOf(512), "cpuset.cpus": "0", "io.weight": "default 200"} {
			want[name] = value
		}
		for name, value := range map[string]string{"cpu.max": "30000 100000", "cpu.weight": weightOf(2048), "cpuset.cpus": "1", "io.weight": "default 200"} {
			updated[name] = value
		}
		args = append(args, "--cpu-quota", "30000", "--cpu-period", "100000", "--cpu-share", "2048", "--cpuset-cpus", "1")
	}
	n.expectFiles("created", dir, want)
	n.crictl(append(args, id)...)
	n.expectFiles("updated", dir, updated)
	status := n.inspect("inspect", id)
	if got := status.text("resources.linux.memoryLimitInBytes"); got != fmt.Sprint(96*mebi) {
		t.Errorf("the status says memory limit %s", got)
	}
	n.crictl("rmp", "-f", pod)
	if left := strings.TrimSpace(n.inside("find", "/sys/fs/cgroup", "-name", "pod"+pod)); left != "" {
		t.Errorf("left: %s", left)
	}
	n.down()
}

// TestLimitHugepages: systemd delegates no hugetlb, but root may, on hosts that mix both cgroup versions, too.
func TestLimitHugepages(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	if !n.hasController("hugetlb") {
		t.Skip("the controller hugetlb is not delegated here")
	}
	pod, podFile := n.runPod("huge", nil)
	id := n.start(pod, podFile, "huge", image, limited("exec sleep 1000", object{"hugepage_limits": []object{{"page_size": "2MB", "limit": 4 * mebi}}}))
	n.expectFiles("created", n.groupOf(id), map[string]string{"hugetlb.2MB.max": fmt.Sprint(4 * mebi)})
	n.crictl("rmp", "-f", pod)
	n.down()
}

// weightOf is runc's conversion since 1.4 (github.com/opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value): a curve
// through 2 → 1, 1024 → 100 and 262144 → 10000.
func weightOf(shares int) string { return map[int]string{512: "59", 2048: "174"}[shares] }

// TestLimitPids: a container that forks without end is held, and its neighbour goes on.
func TestLimitPids(t *testing.T) {
	inVM(t, "pids")
	n, image := upWithBusybox(t, "default")
	pod, podFile := n.runPod("pids", nil)
	bomb := n.start(pod, podFile, "bomb", image, limited("(f() { sleep 1000 & sleep 1000 & f; }; f); exec sleep 1000", object{"unified": object{"pids.max": "20"}}))
	other := n.start(pod, podFile, "other", image, shell("exec sleep 1000"))
	dir := n.groupOf(bomb)
	eventually(t, 2*time.Minute, "the kernel refuses a fork", func() error {
		files := n.groupFiles(dir, "pids.events", "pids.current")
		if current, err := strconv.Atoi(files["pids.current"]); err != nil || current > 20 {
			t.Errorf("pids.current %q, want at most 20", files["pids.current"])
		}
		if counter(files["pids.events"], "max") < 1 {
			return fmt.Errorf("pids.events: %s", files["pids.events"])
		}
		return nil
	})
	if out := n.exec(other, "echo", "alive"); out != "alive" {
		t.Errorf("the neighbour says %q", out)
	}
	n.crictl("rmp", "-f", pod)
	n.down()
}

// TestLimitCPU: of a limit of 0.2 a busy loop gets 0.2, in the kernel's own account: what was used over the periods that have
// passed. On a host that is busy an emulated machine stands still now and then, and the periods of that time count all
// the same: so no window may have more than the limit, and one must come close.
func TestLimitCPU(t *testing.T) {
	inVM(t, "cpu")
	n, image := upWithBusybox(t, "default")
	pod, podFile := n.runPod("cpu", nil)
	const quota, period, tolerance = 20000, 100000, 0.1
	id := n.start(pod, podFile, "busy", image, limited("while :; do :; done", object{"cpu_quota": quota, "cpu_period": period}))
	dir := n.groupOf(id)
	sample := func() (used, periods int64) {
		stat := n.groupFiles(dir, "cpu.stat")["cpu.stat"]
		return counter(stat, "usage_usec"), counter(stat, "nr_periods")
	}
	used, periods := sample()
	eventually(t, 4*time.Minute, "the limit is reached", func() error {
		time.Sleep(5 * time.Second)
		nowUsed, nowPeriods := sample()
		share := float64(nowUsed-used) / float64((nowPeriods-periods)*period)
		t.Logf("%.3f of a processor over %d periods of 100 ms", share, nowPeriods-periods)
		used, periods = nowUsed, nowPeriods
		if most := float64(quota) / period * (1 + tolerance); share > most {
			t.Fatalf("a limit of 0.2 gives %.3f", share)
		}
		if least := float64(quota) / period * (1 - tolerance); share < least {
			return fmt.Errorf("it gives %.3f", share)
		}
		return nil
	})
	n.crictl("rmp", "-f", pod)
	n.down()
}

// hog asks for 256 MiB and writes to all of it.
const hog = "dd if=/dev/zero of=/dev/null bs=256M count=1 2>/dev/null"

// exited waits for a container to end and returns its status.
func (n *node) exited(id string) object {
	n.t.Helper()
	var status object
	eventually(n.t, 2*time.Minute, "container "+id+" has ended", func() error {
		status = n.inspect("inspect", id)
		if state := status.text("state"); state != "CONTAINER_EXITED" {
			return fmt.Errorf("it is %s", state)
		}
		return nil
	})
	return status
}

func (n *node) expectEnd(what, id, reason, code string) {
	n.t.Helper()
	if s := n.exited(id); s.text("reason") != reason || s.text("exitCode") != code {
		n.t.Errorf("%s: reason %q, exit code %s, want %s and %s", what, s.text("reason"), s.text("exitCode"), reason, code)
	}
}

// TestOOM: who is over its limit is killed and told to be; nobody else is either.
func TestOOM(t *testing.T) {
	inVM(t, "memory")
	n, image := upWithBusybox(t, "default")
	limit := object{"memory_limit_in_bytes": 48 * mebi, "memory_swap_limit_in_bytes": 48 * mebi}
	pod, podFile := n.runPod("oom", nil)
	neighbour := n.start(pod, podFile, "neighbour", image, limited("trap 'exit 3' TERM; while :; do sleep 1; done", limit))
	watcher := n.crictlCommand("events", "-o", "json")
	eventsFile := n.path("events.json")
	events, err := os.Create(eventsFile)
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	watcher.Stdout = events
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	n.clients = append(n.clients, func() { _ = watcher.Process.Kill(); _ = watcher.Wait() })
	time.Sleep(3 * time.Second) // crictl says nothing when it has subscribed

	killed := n.start(pod, podFile, "hog", image, limited("exec "+hog, limit))
	n.expectEnd("the hog", killed, "OOMKilled", "137")
	eventually(t, 20*time.Second, "an event tells of it", func() error {
		raw, err := os.ReadFile(eventsFile)
		if err == nil && !strings.Contains(string(raw), "OOMKilled") {
			err = fmt.Errorf("%d bytes of events, none with OOMKilled", len(raw))
		}
		return err
	})

	single := n.start(pod, podFile, "single", image, limited(hog+"; echo survived; exit 4", limit))
	n.expectEnd("one process of it was killed, and it ended by itself", single, "OOMKilled", "4")
	grouped := n.start(pod, podFile, "grouped", image, limited(hog+"; echo survived; exit 4", limit.with("unified", object{"memory.oom.group": "1"})))
	n.expectEnd("killed as a group", grouped, "OOMKilled", "137")
	if log := n.crictl("logs", grouped); strings.Contains(log, "survived") {
		t.Errorf("with memory.oom.group, one process survived: %s", log)
	}
	if log := n.crictl("logs", single); !strings.Contains(log, "survived") {
		t.Errorf("without memory.oom.group, the whole container was killed: %s", log)
	}

	execed := n.start(pod, podFile, "execed", image, limited("trap 'exit 5' TERM; while :; do sleep 1; done", limit))
	if r := n.try("exec", "-s", execed, "sh", "-c", "exec "+hog); r.code == 0 {
		t.Errorf("a hog that was executed in a container ended well: %s%s", r.out, r.errs)
	}
	if s := n.inspect("inspect", execed); s.text("state") != "CONTAINER_RUNNING" {
		t.Errorf("the container of the executed hog is %s", s.text("state"))
	}
	n.crictl("stop", "--timeout", "20", execed)
	n.expectEnd("a process executed in it was killed", execed, "OOMKilled", "5")

	if s := n.inspect("inspect", neighbour); s.text("state") != "CONTAINER_RUNNING" {
		t.Errorf("the neighbour is %s", s.text("state"))
	}
	n.crictl("stop", "--timeout", "20", neighbour)
	n.expectEnd("the neighbour", neighbour, "Error", "3")
	n.crictl("rmp", "-f", pod)
	n.down()
}

// TestOOMOfPod: the kubelet's limit on the pod's cgroup kills the container that uses most, and only it is told to be.
func TestOOMOfPod(t *testing.T) {
	inVM(t, "memory")
	n, image := upWithBusybox(t, "default")
	const parent = "/kubepods/burstable/poduid-oom"
	n.inside("sh", "-ec", "mkdir -p /sys/fs/cgroup"+parent+"; cd /sys/fs/cgroup; for d in kubepods kubepods/burstable; do echo '+memory +pids' >$d/cgroup.subtree_control; done; "+
		fmt.Sprintf("echo %d >.%s/memory.max; echo 0 >.%s/memory.swap.max", 64*mebi, parent, parent))
	pod, podFile := n.runPod("podoom", object{"linux": object{"cgroup_parent": parent}})
	neighbour := n.start(pod, podFile, "neighbour", image, shell("trap 'exit 3' TERM; while :; do sleep 1; done"))
	killed := n.start(pod, podFile, "hog", image, shell("exec "+hog))
	n.expectEnd("the hog", killed, "OOMKilled", "137")
	n.crictl("stop", "--timeout", "20", neighbour)
	n.expectEnd("the neighbour", neighbour, "Error", "3")
	n.crictl("rmp", "-f", pod)
	n.expectFiles("after the pod", "/sys/fs/cgroup"+parent, map[string]string{"memory.max": fmt.Sprint(64 * mebi)})
	n.inside("sh", "-c", "cd /sys/fs/cgroup; rmdir ."+parent+" kubepods/burstable kubepods")
	n.down()
}
