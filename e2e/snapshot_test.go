package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// world is what the machine shows to this user: things that a node could leave behind and that are not in its home.
type world struct {
	tmp       []string // entries of /tmp and /var/tmp that belong to this user
	links     []string // network interfaces
	listening []string // sockets of this user's that listen: protocol and local address
	cgroups   []string // directories of the cgroup v2 tree that belong to this user
}

func observe() world {
	return world{tmp: ownFiles("/tmp", "/var/tmp"), links: links(), listening: listening(), cgroups: cgroups()}
}

// since lists what is in w and was not in before.
func (w world) since(before world) []string {
	var out []string
	add := func(what string, now, then []string) {
		for _, x := range now {
			if !slices.Contains(then, x) {
				out = append(out, what+" "+x)
			}
		}
	}
	add("file", w.tmp, before.tmp)
	add("interface", w.links, before.links)
	add("listening socket", w.listening, before.listening)
	add("cgroup", w.cgroups, before.cgroups)
	return out
}

func ownFiles(dirs ...string) []string {
	var out []string
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			info, err := e.Info()
			// The homes and the Go tool's directories are the tests' own.
			if err != nil || strings.HasPrefix(e.Name(), "ce-") || strings.HasPrefix(e.Name(), "go-") || strings.HasPrefix(e.Name(), "Test") {
				continue
			}
			if stat, ok := info.Sys().(*syscall.Stat_t); ok && int(stat.Uid) == os.Getuid() {
				out = append(out, filepath.Join(dir, e.Name()))
			}
		}
	}
	return out
}

func links() []string {
	raw, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			out = append(out, strings.TrimSpace(name))
		}
	}
	return out
}

// listening reads /proc/net: TCP sockets in state 0A (listen), and UDP sockets that no peer is set for (07).
func listening() []string {
	var out []string
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		raw, err := os.ReadFile("/proc/self/net/" + proto)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(raw)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[7] != strconv.Itoa(os.Getuid()) || f[3] != "0A" && f[3] != "07" {
				continue
			}
			out = append(out, proto+" "+f[1])
		}
	}
	return out
}

// cgroups walks the cgroup v2 tree from the directory above this process's own.
func cgroups() []string {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		own, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for _, mount := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
			top := filepath.Join(mount, filepath.Dir(own))
			if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err != nil {
				continue
			}
			_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					if info, err := d.Info(); err == nil {
						if stat, ok := info.Sys().(*syscall.Stat_t); ok && int(stat.Uid) == os.Getuid() && !ofSystemd(path) {
							out = append(out, path)
						}
					}
				}
				return nil // a directory may go while it is walked
			})
			break
		}
	}
	sort.Strings(out)
	return out
}

// traces are the marks of one node by which the kernel's things are known as its own.
type traces struct {
	pids       map[int]string  // every process of the node → its start time
	namespaces map[string]bool // their network, pid and mount namespaces that are not the test's: "net:[4026532000]"
}

// trace walks the process tree below `coracle up`.
func (n *node) trace() traces {
	tr := traces{pids: map[int]string{}, namespaces: map[string]bool{}}
	children := map[int][]int{}
	starts := map[int]string{}
	for _, pid := range processes() {
		parent, start, ok := stat(pid)
		if ok {
			children[parent] = append(children[parent], pid)
			starts[pid] = start
		}
	}
	var walk func(pid int)
	walk = func(pid int) {
		tr.pids[pid] = starts[pid]
		for _, kind := range []string{"net", "pid", "mnt"} {
			ns := namespace(pid, kind)
			if ns != "" && ns != namespace(os.Getpid(), kind) {
				tr.namespaces[ns] = true
			}
		}
		for _, c := range children[pid] {
			walk(c)
		}
	}
	if starts[n.cmd.Process.Pid] != "" {
		walk(n.cmd.Process.Pid)
	}
	for pid, start := range n.traces.pids { // what has lost its parent since is not forgotten
		if _, ok := tr.pids[pid]; !ok {
			tr.pids[pid] = start
		}
	}
	for ns := range n.traces.namespaces {
		tr.namespaces[ns] = true
	}
	return tr
}

func processes() []int {
	var out []int
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

// stat gives a process's parent and start time; ok is false for one that is gone. A zombie is gone: it holds nothing,
// and it is the affair of whoever is to wait for it, which for an orphan is the machine's init.
func stat(pid int) (parent int, start string, ok bool) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, "", false
	}
	f := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(f) < 20 || string(f[0]) == "Z" || string(f[0]) == "X" {
		return 0, "", false
	}
	parent, err = strconv.Atoi(string(f[1]))
	return parent, string(f[19]), err == nil
}

func namespace(pid int, kind string) string {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		return ""
	}
	return link
}

// expectNothingLeft fails the test where anything of the node is there after the time.
func (n *node) expectNothingLeft(within time.Duration) {
	n.t.Helper()
	deadline := time.Now().Add(within)
	left := n.leftInKernel()
	for len(left) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
		left = n.leftInKernel()
	}
	left = append(left, n.leftOnDisk()...)
	for _, l := range left {
		n.t.Errorf("left behind by node %s: %s", n.name, l)
	}
}

// leftInKernel lists processes, namespaces, mounts, and what of the world is new.
func (n *node) leftInKernel() []string {
	var out []string
	mark := []byte("XDG_RUNTIME_DIR=" + n.path("run") + "\x00")
	seen := map[string]bool{}
	for _, pid := range processes() {
		if _, start, ok := stat(pid); ok && n.traces.pids[pid] == start && start != "" {
			out = append(out, "process "+describe(pid))
		} else if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err == nil && bytes.Contains(env, mark) && n.alone() {
			out = append(out, "process "+describe(pid)+", by its environment")
		}
		for _, kind := range []string{"net", "pid", "mnt"} {
			if ns := namespace(pid, kind); n.traces.namespaces[ns] {
				out = append(out, "namespace "+ns+" of process "+describe(pid))
			}
		}
		if ns := namespace(pid, "mnt"); ns != "" && !seen[ns] {
			seen[ns] = true
			out = append(out, n.mounts(pid)...)
		}
	}
	for _, l := range observe().since(n.before) {
		if n.alone() {
			out = append(out, l)
		}
	}
	return append(out, n.unixSockets()...)
}

// alone tells whether no other node of this home is up, whose things would be taken for this one's.
func (n *node) alone() bool {
	found, err := filepath.Glob(n.path("run", "*", "node.json"))
	return err == nil && (len(found) == 0 || len(found) == 1 && filepath.Dir(found[0]) == n.runtimeDir())
}

func describe(pid int) string {
	args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(strings.ReplaceAll(string(args), "\x00", " ")))
}

// mounts lists those of a process's that have to do with the node's directories.
func (n *node) mounts(pid int) []string {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.Contains(s.Text(), n.runtimeDir()+"/") || strings.Contains(s.Text(), n.dataDir()+"/") {
			out = append(out, fmt.Sprintf("mount in the namespace of process %d: %s", pid, s.Text()))
		}
	}
	return out
}

func (n *node) unixSockets() []string {
	raw, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		if strings.Contains(line, n.runtimeDir()+"/") {
			out = append(out, "unix socket "+strings.TrimSpace(line))
		}
	}
	return out
}

func (n *node) folder() string {
	if n.name == "default" {
		return "coracle"
	}
	return "coracle-" + n.name
}

func (n *node) runtimeDir() string { return n.path("run", n.folder()) }
func (n *node) dataDir() string    { return n.path("data", n.folder()) }

// leftOnDisk lists what is in the runtime directory, which is to be empty or gone, and half-made things of the image
// store. Images, the lock, a log, and the records of pods stay in the data directory: pods that were not removed are
// shown as not ready by the next `coracle up`, as after a reboot.
func (n *node) leftOnDisk() []string {
	var out []string
	_ = filepath.WalkDir(n.runtimeDir(), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != n.runtimeDir() {
			out = append(out, "file "+path)
		}
		return nil // what cannot be read is not there
	})
	return append(out, glob(n.t, n.dataDir(), "images/tmp/*")...)
}

func glob(t *testing.T, dir string, patterns ...string) []string {
	t.Helper()
	var out []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			out = append(out, "file "+f)
		}
	}
	return out
}

// ofSystemd tells the cgroups that the user's systemd makes for its own units, when it needs them.
func ofSystemd(path string) bool {
	return strings.Contains(path, "/user@") && !strings.Contains(path, "/coracle-")
}
