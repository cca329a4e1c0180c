package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/coracle-cri/coracle/e2e/box"
)

// TestStats asks crictl for all that it tells of what pods use.
func TestStats(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", n.daemon()))
	if err != nil {
		t.Fatal(err)
	}
	testStats(n, image, strings.Contains(string(groups), "/coracle-default"))
	n.crictl("rmp", "--all", "--force")
	n.down()
}

// TestStatsWithoutCgroups is the same where the machine gives no cgroup: in a container, say.
func TestStatsWithoutCgroups(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{NoCgroup: true})
		return
	}
	n, image := upWithBusybox(t, "default")
	if out := n.coracle("status").out; !strings.Contains(out, "no cgroups") {
		t.Fatalf("this node has cgroups:\n%s", out)
	}
	testStats(n, image, false)
	n.crictl("rmp", "--all", "--force")
	n.down()
}

const written = 6 << 20 // what the container that works writes, and what it then holds in memory at least

// testStats: counted tells whether a kernel's cgroup counts, or only /proc tells.
func testStats(n *node, image string, counted bool) {
	pod, file := n.runPod("stats", nil)
	server := n.start(pod, file, "server", image, nil)
	worker := n.start(pod, file, "worker", image, shell(fmt.Sprintf(
		`dd if=/dev/zero of=/big bs=1024 count=%d 2>/dev/null; i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done
		x=$(tr '\0' x </big); echo ready; sleep 1000; : $x`, written>>10)))
	n.awaitLog(worker, "ready")
	idle, _ := n.runPod("idle", nil)
	client, clientFile := n.runPod("client", nil)
	id := n.start(client, clientFile, "asks", image, shell("sleep 1000"))
	for range 3 {
		n.exec(id, "wget", "-q", "-O", "/dev/null", "http://"+n.podIP(pod)+":8080/")
	}
	n.checkContainerStats(worker, server, counted)
	n.checkPodStats(pod, idle, counted)
	n.checkMetrics(pod, worker, counted)
}

func (n *node) awaitLog(id, text string) {
	n.t.Helper()
	eventually(n.t, upTimeout, "the container says "+text, func() error {
		if logs := n.crictl("logs", id); !strings.Contains(logs, text) {
			return fmt.Errorf("its log is %q", logs)
		}
		return nil
	})
}

// row finds the line of a table that begins with, or has in its second column, the short form of an id.
func row(t *testing.T, table, id string) []string {
	t.Helper()
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == id[:13] || f[1] == id[:13]) {
			return f
		}
	}
	t.Errorf("no row of %s in:\n%s", id[:13], table)
	return make([]string, 10)
}

var size = regexp.MustCompile(`^[0-9.]+[kMG]B$`)

func (n *node) checkContainerStats(worker, server string, counted bool) {
	t := n.t
	table := n.crictl("stats")
	for _, id := range []string{worker, server} { // CONTAINER NAME CPU% MEM DISK INODES SWAP
		f := row(t, table, id)
		if _, err := strconv.ParseFloat(f[2], 64); err != nil || !size.MatchString(f[3]) {
			t.Errorf("crictl stats:\n%s", table)
		}
	}
	var answer struct{ Stats []object }
	raw := n.crictl("stats", "-o", "json", "--id", worker)
	if err := json.Unmarshal([]byte(raw), &answer); err != nil || len(answer.Stats) != 1 {
		t.Fatalf("crictl stats -o json: %v\n%s", err, raw)
	}
	s := answer.Stats[0]
	if s.text("attributes.id") != worker || s.text("attributes.metadata.name") != "worker" {
		t.Errorf("stats are of %v", s["attributes"])
	}
	for field, least := range map[string]int{"writableLayer.usedBytes.value": written, "writableLayer.inodesUsed.value": 1,
		"cpu.usageCoreNanoSeconds.value": 1e7, "cpu.timestamp": 1, "memory.workingSetBytes.value": written, "memory.timestamp": 1} {
		if value, err := strconv.Atoi(s.text(field)); err != nil || value < least {
			t.Errorf("%s is %q, want at least %d:\n%s", field, s.text(field), least, raw)
		}
	}
	if pressure := s.field("cpu.psi") != nil; pressure && !counted {
		t.Errorf("pressure without a cgroup:\n%s", raw)
	}
}

func (n *node) checkPodStats(pod, idle string, counted bool) {
	t := n.t
	table := n.crictl("statsp")
	if f := row(t, table, pod); f[0] != "stats" || !size.MatchString(f[3]) { // NAME POD CPU% MEM
		t.Errorf("crictl statsp:\n%s", table)
	}
	var answer struct{ Stats []object }
	raw := n.crictl("statsp", "-o", "json", "--id", pod[:13])
	if err := json.Unmarshal([]byte(raw), &answer); err != nil || len(answer.Stats) != 1 {
		t.Fatalf("crictl statsp -o json: %v\n%s", err, raw)
	}
	s := answer.Stats[0]
	for field, least := range map[string]int{"linux.cpu.usageCoreNanoSeconds.value": 1e7, "linux.memory.workingSetBytes.value": written,
		"linux.process.processCount.value": 3, "linux.network.defaultInterface.rxBytes.value": 100, "linux.network.defaultInterface.txBytes.value": 100} {
		if value, err := strconv.Atoi(s.text(field)); err != nil || value < least {
			t.Errorf("%s is %q, want at least %d:\n%s", field, s.text(field), least, raw)
		}
	}
	if containers, ok := s.field("linux.containers").([]any); !ok || len(containers) != 2 || s.text("linux.network.defaultInterface.name") != "eth0" {
		t.Errorf("crictl statsp -o json:\n%s", raw)
	}
	if pressure := s.field("linux.cpu.psi") != nil; pressure && !counted {
		t.Errorf("pressure without a cgroup:\n%s", raw)
	}
	raw = n.crictl("statsp", "-o", "json", "--label", "app=idle")
	if err := json.Unmarshal([]byte(raw), &answer); err != nil || len(answer.Stats) != 1 || answer.Stats[0].text("attributes.id") != idle {
		t.Errorf("crictl statsp --label: %v\n%s", err, raw)
	}
}

type metric struct {
	Name, MetricType string
	LabelValues      []string
	Value            struct{ Value string }
}

func (n *node) checkMetrics(pod, worker string, counted bool) {
	t := n.t
	var descs struct {
		Descriptors []struct {
			Name, Help string
			LabelKeys  []string
		}
	}
	raw := n.crictl("metricdescs")
	if err := json.Unmarshal([]byte(raw), &descs); err != nil || len(descs.Descriptors) == 0 {
		t.Fatalf("crictl metricdescs: %v\n%s", err, raw)
	}
	keys := map[string][]string{}
	for _, d := range descs.Descriptors {
		keys[d.Name] = d.LabelKeys
	}
	var answer struct {
		PodMetrics []struct {
			PodSandboxID     string
			Metrics          []metric
			ContainerMetrics []struct {
				ContainerID string
				Metrics     []metric
			}
		}
	}
	raw = n.crictl("metricsp")
	if err := json.Unmarshal([]byte(raw), &answer); err != nil || len(answer.PodMetrics) != 3 {
		t.Fatalf("crictl metricsp: %v\n%s", err, raw)
	}
	values := map[string]int{}
	note := func(all []metric, id string) {
		for _, m := range all {
			if k := keys[m.Name]; len(k) == 0 || len(k) != len(m.LabelValues) || m.LabelValues[0] != id {
				t.Errorf("%v does not fit its descriptor %v", m, k)
			}
			values[m.Name], _ = strconv.Atoi(m.Value.Value)
		}
	}
	for _, p := range answer.PodMetrics {
		if p.PodSandboxID != pod {
			continue
		}
		note(p.Metrics, pod)
		for _, c := range p.ContainerMetrics {
			if c.ContainerID == worker {
				note(c.Metrics, worker)
			}
		}
	}
	for name, least := range map[string]int{"container_network_receive_bytes_total": 100, "container_network_transmit_packets_total": 3,
		"container_memory_working_set_bytes": written, "container_fs_usage_bytes": written, "container_fs_limit_bytes": written, "container_processes": 2,
		"container_threads": 2, "container_file_descriptors": 6, "container_start_time_seconds": 1e9, "container_last_seen": 1e9,
		"container_ulimits_soft": 1, "container_cpu_usage_seconds_total": 0} {
		if value, told := values[name]; !told || value < least {
			t.Errorf("%s is %d, want at least %d", name, value, least)
		}
	}
	for _, name := range []string{"container_cpu_user_seconds_total", "container_pressure_cpu_waiting_seconds_total"} {
		if _, told := values[name]; told && !counted {
			t.Errorf("%s without a cgroup", name)
		}
	}
	if _, told := values["container_cpu_user_seconds_total"]; !told && counted {
		t.Error("no CPU time apart for user and kernel, although there is a cgroup")
	}
}
