package cluster

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const mebi = 1 << 20

// qosSettings are the kubelet's in the test VM, and those of the rootful one that it is compared with: every
// setting that has to do with cgroups.
const qosSettings = `featureGates: {MemoryQoS: true}
memoryReservationPolicy: TieredReservation
memoryThrottlingFactor: 0.9
podPidsLimit: 64
systemReserved: {cpu: 500m, memory: 200Mi, pid: "1000"}
cpuManagerPolicy: static
`

// podPidsLimit is that of qosSettings.
const podPidsLimit = 64

// delegated skips a test of limits where the node has not every controller that the kubelet writes to.
func delegated(t *testing.T) {
	t.Helper()
	have, err := the.coracle("enter", "--", "sh", "-c", "cat /sys/fs/cgroup/cgroup.controllers 2>/dev/null || true")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"cpu", "memory", "pids"} {
		if !slices.Contains(strings.Fields(have), c) {
			if inVM {
				t.Fatalf("in the VM the node has the controllers %q", have)
			}
			t.Skipf("this host does not delegate the controller %s; to run this test: make kube-vm", c)
		}
	}
}

// group is the directory of a container's cgroup, as the node sees it.
func (s *space) group(pod, container string) string {
	s.t.Helper()
	var id string
	s.eventually("container "+container+" of "+pod+" has an id", func() error {
		id = s.get("pod/"+pod, `{.status.containerStatuses[?(@.name=="`+container+`")].containerID}`)
		if !strings.HasPrefix(id, "coracle://") {
			return fmt.Errorf("it is %q", id)
		}
		return nil
	})
	out, err := the.coracle("enter", "--", "find", "/sys/fs/cgroup/kubepods", "-type", "d", "-name", strings.TrimPrefix(id, "coracle://"))
	if err != nil {
		s.t.Fatal(err)
	}
	dir := strings.TrimSpace(out)
	if dir == "" || strings.Contains(dir, "\n") {
		s.t.Fatalf("cgroups of container %s of %s: %q, want one", container, pod, dir)
	}
	return dir
}

// files reads files of a cgroup. A path may lead up: ../../memory.max is that of the kubelet's cgroup of the pod, since
// the runtime has one of its own below.
func files(t *testing.T, dir string, names ...string) map[string]string {
	t.Helper()
	args := []string{"enter", "--", "grep", "-H", ""}
	for _, name := range names {
		args = append(args, dir+"/"+name)
	}
	out, err := the.coracle(args...)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for line := range strings.Lines(out) {
		if file, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":"); ok {
			name := strings.TrimPrefix(file, dir+"/")
			found[name] = strings.TrimSpace(found[name] + "\n" + value)
		}
	}
	return found
}

// differences compares files of a cgroup with what is wanted.
func differences(t *testing.T, dir string, want map[string]string) error {
	t.Helper()
	names := make([]string, 0, len(want))
	for name := range want {
		names = append(names, name)
	}
	slices.Sort(names)
	got := files(t, dir, names...)
	var wrong []string
	for _, name := range names {
		if got[name] != want[name] {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %q", name, got[name], want[name]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%s: %s", dir, strings.Join(wrong, "; "))
	}
	return nil
}

// counter is the number behind a key of a flat-keyed file; -1 where there is none.
func counter(text, key string) int64 {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+" "); ok {
			if n, err := strconv.ParseInt(value, 10, 64); err == nil {
				return n
			}
		}
	}
	return -1
}
