package cluster

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// qosPod is a pod of the host's network, whose uid, and so the name of whose cgroup, is its name. Each container is its name and
// its resources.
func qosPod(name, spec string, containers ...[2]string) string {
	text := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %[1]s, uid: %[1]s, namespace: default}\nspec:\n  hostNetwork: true\n"+
		"  terminationGracePeriodSeconds: 0\n%[2]s  containers:\n", name, spec)
	for _, c := range containers {
		text += fmt.Sprintf("  - name: %s\n    image: %s\n    command: [sleep, '1000000']\n    resources: %s\n", c[0], the.busybox, c[1])
	}
	return text
}

// qosPods are of every class, with limits and without, at the container's level and the pod's. The processor of the
// guaranteed one is its own: the kubelet's static policy gives it a cpuset.
func qosPods() map[string]string {
	return map[string]string{
		"guaranteed": qosPod("guaranteed", "", [2]string{"main", "{limits: {cpu: 1, memory: 64Mi}}"}),
		"fraction":   qosPod("fraction", "", [2]string{"main", "{limits: {cpu: 50m, memory: 32Mi}}"}, [2]string{"side", "{limits: {cpu: 50m, memory: 16Mi}}"}),
		"burstable": qosPod("burstable", "", [2]string{"limited", "{requests: {cpu: 50m, memory: 16Mi}, limits: {cpu: 150m, memory: 48Mi}}"},
			[2]string{"asking", "{requests: {cpu: 30m, memory: 8Mi}}"}, [2]string{"silent", "{}"}),
		"bounded": qosPod("bounded", "", [2]string{"main", "{requests: {cpu: 20m, memory: 8Mi}, limits: {cpu: 100m, memory: 32Mi}}"},
			[2]string{"side", "{requests: {cpu: 10m, memory: 8Mi}, limits: {cpu: 30m, memory: 16Mi}}"}),
		"podlevel": qosPod("podlevel", "  resources: {requests: {cpu: 40m, memory: 24Mi}, limits: {cpu: 80m, memory: 64Mi}}\n",
			[2]string{"main", "{}"}, [2]string{"side", "{requests: {cpu: 10m}}"}),
		"besteffort": qosPod("besteffort", "", [2]string{"main", "{}"}, [2]string{"side", "{}"}),
	}
}

// settingFiles are the files of a cgroup that hold what somebody has asked for.
var settingFiles = []string{"cpu.weight", "cpu.max", "cpu.idle", "cpuset.cpus", "cpuset.mems", "memory.min", "memory.low", "memory.high", "memory.max",
	"memory.swap.max", "memory.swap.high", "memory.oom.group", "pids.max", "io.weight", "io.max", "hugetlb.*.max", "cgroup.max.*"}

// tree is the setting files of the kubelet's cgroups, by path and name: kubepods/burstable/poduid/container/cpu.max.
type tree map[string]string

// readTree parses what grep prints of the files below /sys/fs/cgroup. A container's directory gets its name; other
// directories of a pod are the runtime's own, whose files are returned apart: the one that coracle has between the
// kubelet's cgroup of the pod and those of the containers, and that of containerd's pause container.
func readTree(text string, containers map[string]string) (settings, others tree) {
	settings, others = tree{}, tree{}
	for line := range strings.Lines(text) {
		file, value, ok := strings.Cut(strings.TrimSpace(strings.TrimPrefix(line, "/sys/fs/cgroup/")), ":")
		if !ok {
			continue
		}
		parts := strings.Split(file, "/")
		pod := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, "pod") })
		name, dirs := parts[len(parts)-1], parts[:len(parts)-1]
		into, at := settings, strings.Join(dirs, "/")
		if pod >= 0 && len(dirs) > pod+1 {
			container, known := containers[dirs[len(dirs)-1]]
			if !known {
				into = others
			} else {
				at = strings.Join(dirs[:pod+1], "/") + "/" + filepath.Base(container)
			}
		}
		into[at+"/"+name] = strings.TrimSpace(into[at+"/"+name] + "\n" + value)
	}
	return settings, others
}

func grepTree() []string {
	args := []string{"grep", "-rH"}
	for _, pattern := range settingFiles {
		args = append(args, "--include="+pattern)
	}
	return append(args, "", "/sys/fs/cgroup/kubepods")
}

// expected waits until the containers of every pod run, as the CRI lists them.
func expected(t *testing.T, who string, list func() (string, error)) map[string]string {
	t.Helper()
	var found map[string]string
	eventually(t, who+": the pods run", func() error {
		text, err := list()
		if err != nil {
			return err
		}
		if found, err = running(text); err != nil {
			return err
		}
		maps.DeleteFunc(found, func(_, name string) bool { return qosPods()[filepath.Dir(name)] == "" })
		want := 0
		for _, manifest := range qosPods() {
			want += strings.Count(manifest, "  - name: ")
		}
		if len(found) != want {
			return fmt.Errorf("%d containers run, want %d: %q", len(found), want, slices.Sorted(maps.Values(found)))
		}
		return nil
	})
	return found
}

// TestQOS: what the kubelet and coracle write for pods of each class, without root, is what a kubelet that is root's writes
// with containerd and runc, in every file of each level. hugetlb is left out: systemd does not delegate it.
func TestQOS(t *testing.T) {
	delegated(t)
	if rootfulPrograms == "" {
		t.Skip("CORACLE_E2E_ROOTFUL does not name containerd and runc, to be run as root; to run this test: make kube-vm")
	}
	reference := startRootful(t)
	ours := filepath.Join(the.dir, "data", "coracle-"+node, "kubelet", "manifests")
	for name, manifest := range qosPods() {
		for _, dir := range []string{reference.manifests, ours} {
			file := filepath.Join(dir, name+".yaml")
			if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
				t.Fatal(err)
			}
			if dir == ours {
				t.Cleanup(func() { _ = os.Remove(file) })
			}
		}
	}
	theirContainers := expected(t, "the rootful kubelet", func() (string, error) { return reference.crictl("ps", "-o", "json") })
	ourContainers := expected(t, "the kubelet", func() (string, error) { return the.crictl("ps", "-o", "json") })
	eventually(t, "the trees are alike", func() error {
		raw, err := exec.Command(grepTree()[0], grepTree()[1:]...).Output()
		if err != nil {
			return fmt.Errorf("read the rootful tree: %w", err)
		}
		theirs, _ := readTree(string(raw), theirContainers)
		text, err := the.coracle(append([]string{"enter", "--"}, grepTree()...)...)
		if err != nil {
			return err
		}
		mine, between := readTree(text, ourContainers)
		return compareTrees(t, theirs, mine, between)
	})
}

// compareTrees tells every difference.
func compareTrees(t *testing.T, theirs, mine, between tree) error {
	t.Helper()
	logged := &strings.Builder{}
	var wrong []string
	seen := 0
	for _, file := range slices.Sorted(maps.Keys(theirs)) {
		if strings.HasPrefix(filepath.Base(file), "hugetlb.") {
			continue
		}
		seen++
		fmt.Fprintf(logged, "%s\t%q\n", file, mine[file])
		if got, there := mine[file]; !there || got != theirs[file] {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %q", file, got, theirs[file]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d of %d files differ:\n%s", len(wrong), seen, strings.Join(wrong, "\n"))
	}
	for _, file := range slices.Sorted(maps.Keys(between)) {
		// What coracle has between the two limits nothing: the pod's limits are the kubelet's above it.
		if value := between[file]; strings.HasSuffix(file, ".max") && !strings.HasPrefix(value, "max") && value != "" {
			return fmt.Errorf("%s is %q and limits the pod", file, value)
		}
	}
	t.Logf("%d files of the kubelet's cgroups are the same:\n%s", seen, logged)
	return nil
}
