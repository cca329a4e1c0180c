package faults

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// tally is how much of everything a node has: what a pod takes and must give back.
type tally map[string]int

// tally counts what the kernel, the disk and the two programs have. What it cannot count fails the test.
func (n *node) tally() tally {
	n.t.Helper()
	daemon, err := n.daemon()
	if err != nil {
		n.t.Fatal(err)
	}
	keeper, err := n.keeper()
	if err != nil {
		n.t.Fatal(err)
	}
	out := tally{}
	n.countProcesses(out)
	n.countGoroutines(out)
	for name, pid := range map[string]int{"parent": n.cmd.Process.Pid, "keeper": keeper, "daemon": daemon} {
		out["descriptors of the "+name] = entries(n.t, fmt.Sprintf("/proc/%d/fd", pid))
		out["mounts seen by the "+name] = n.mounts(pid)
	}
	links, err := n.enter("cat", "/proc/net/dev")
	if err != nil {
		n.t.Fatal(err)
	}
	out["network interfaces"] = strings.Count(links, ":")
	routes, err := n.enter("cat", "/proc/net/route")
	if err != nil {
		n.t.Fatal(err)
	}
	out["routes"] = strings.Count(routes, "\n")
	out["listening sockets"] = n.listening()
	all, err := n.census()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, line := range all.lines { // cgroups, addresses, ports and what else it knows
		kind, _, _ := strings.Cut(line, " ")
		out[kind+" of the census"]++
	}
	out["files of the runtime directory"] = files(n.t, n.runtimeDir())
	out["files of the data directory"] = files(n.t, n.dataDir())
	return out
}

func (n *node) countProcesses(out tally) {
	namespaces := map[string]bool{}
	var walk func(pid int)
	walk = func(pid int) {
		out["processes"]++
		for _, kind := range []string{"net", "ipc", "uts", "pid", "mnt", "cgroup", "user"} {
			if link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil {
				namespaces[link] = true
			}
		}
		for _, child := range children(pid) {
			walk(child)
		}
	}
	walk(n.cmd.Process.Pid)
	out["namespaces of processes"] = len(namespaces)
}

func (n *node) countGoroutines(out tally) {
	n.t.Helper()
	status, err := n.runtime.Status(n.context(), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		n.t.Fatal(err)
	}
	var config struct {
		Goroutines int
		Keeper     struct{ Goroutines int }
	}
	if err := json.Unmarshal([]byte(status.Info["config"]), &config); err != nil || config.Goroutines == 0 || config.Keeper.Goroutines == 0 {
		n.t.Fatalf("the status tells of no goroutines: %v: %s", err, status.Info["config"])
	}
	out["goroutines of the daemon"], out["goroutines of the keeper"] = config.Goroutines, config.Keeper.Goroutines
}

// listening counts this user's listening TCP sockets, of this machine and of the node.
func (n *node) listening() int {
	n.t.Helper()
	inside, err := n.enter("cat", "/proc/net/tcp", "/proc/net/tcp6")
	if err != nil {
		n.t.Fatal(err)
	}
	count := 0
	for line := range strings.Lines(inside) {
		if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" {
			count++
		}
	}
	for _, file := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		raw, err := os.ReadFile(file)
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); len(f) > 7 && f[3] == "0A" && f[7] == strconv.Itoa(os.Getuid()) {
				count++
			}
		}
	}
	return count
}

// files counts what is in a directory, other users' directories below it as one.
func files(t *testing.T, top string) (count int) {
	t.Helper()
	err := filepath.WalkDir(top, func(_ string, d fs.DirEntry, err error) error {
		count++
		if err != nil && d != nil && d.IsDir() {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}

func entries(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// mounts counts a process's mounts: all below the node's directory, and elsewhere those that have come since the first count, but
// for where this machine has one, too. The machine's own come and go beside the test, and one that it removes stays in a namespace
// that has it locked.
func (n *node) mounts(pid int) (count int) {
	n.t.Helper()
	seen := mountPoints(n.t, pid)
	first := n.foreign[pid] == nil
	if first {
		n.foreign[pid] = map[string]bool{}
	}
	for _, at := range mountPoints(n.t, os.Getpid()) {
		n.foreign[pid][at] = true
	}
	for id, at := range seen {
		if first {
			n.foreign[pid][id] = true
		}
		if strings.HasPrefix(at, n.dir+"/") || !n.foreign[pid][at] && !n.foreign[pid][id] {
			count++
		}
	}
	return count
}

// mountPoints are a process's, by the mount's id.
func mountPoints(t *testing.T, pid int) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		out[fields[0]] = fields[4]
	}
	return out
}

// differences tells what is more, or less, than before. Connections that were kept for the next pull are closed after a
// while, so that fewer descriptors and goroutines are no difference.
func (now tally) differences(before tally) []string {
	var out []string
	what := maps.Clone(before) // of what there is nothing any more, too
	maps.Copy(what, now)
	for _, what := range slices.Sorted(maps.Keys(what)) {
		kept := strings.HasPrefix(what, "descriptors") || strings.HasPrefix(what, "goroutines")
		if now[what] > before[what] || now[what] < before[what] && !kept {
			out = append(out, fmt.Sprintf("%s: %d, were %d", what, now[what], before[what]))
		}
	}
	return out
}

func (now tally) String() string {
	var out []string
	for _, what := range slices.Sorted(maps.Keys(now)) {
		out = append(out, fmt.Sprintf("%s %d", what, now[what]))
	}
	return strings.Join(out, ", ")
}

// kib is a process's proportional set size, the field of /proc/PID/smaps_rollup or /proc/PID/status named, in KiB.
func kib(t *testing.T, pid int, file, field string) int {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if words := strings.Fields(s.Text()); len(words) == 3 && words[0] == field+":" {
			value, err := strconv.Atoi(words[1])
			if err != nil {
				t.Fatal(err)
			}
			return value
		}
	}
	t.Fatalf("%s has no %s", f.Name(), field)
	return 0
}

// cpuSeconds is what a process has used.
func cpuSeconds(t *testing.T, pid int) float64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	if err1 != nil || err2 != nil {
		t.Fatalf("%v, %v", err1, err2)
	}
	return float64(user+system) / 100 // USER_HZ, which is 100 on every architecture that Go has
}
