package cgroupv2

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// host is the machine that Find looks at: the real one or, in tests, a directory with a copy of its files.
type host struct {
	root     string // prefix of every path that is opened, "" on the real machine
	pid      int
	uid      int
	starter  int // the pid of the parent where it is this very program (`up --detach`), else 0
	writable func(path string) error
	user     string                                 // the name of uid, "" where it has none
	dial     func(context.Context) (manager, error) // the user's systemd; nil where it is not to be asked
}

func thisHost() host {
	h := host{pid: os.Getpid(), uid: os.Geteuid(), writable: mayWrite, dial: dialUserSystemd}
	if u, err := user.LookupId(strconv.Itoa(h.uid)); err == nil {
		h.user = u.Username
	}
	if parent := os.Getppid(); sameProgram(parent) {
		h.starter = parent
	}
	return h
}

// mayWrite asks with the effective ids, as the write itself will be judged (access(2) asks with the real ones).
func mayWrite(path string) error {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS)
}

func sameProgram(pid int) bool {
	ours, err := os.Stat("/proc/self/exe")
	if err != nil {
		return false
	}
	theirs, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
	return err == nil && os.SameFile(ours, theirs)
}

func (h host) group(path string) group { return group(h.root + path) }

// place is where this process stands in the cgroup v2 hierarchy.
type place struct {
	mount mountPoint
	found bool     // a cgroup2 mount exists
	known bool     // the kernel has a v2 hierarchy
	own   string   // this process's cgroup, relative to the root of its cgroup namespace
	v1    []string // controllers, by their v2 names, that a v1 hierarchy has taken
}

// dir is the directory of cgroup p of the hierarchy.
func (pl place) dir(p string) string { return filepath.Join(pl.mount.point, p) }

// locate reads /proc/self/cgroup and mountinfo. Of several cgroup2 mounts the first counts, as for every other
// tool that looks (rootlesskit moves its processes through that one).
func (h host) locate() (place, error) {
	var pl place
	raw, err := os.ReadFile(h.root + "/proc/self/cgroup")
	if err != nil {
		return pl, fmt.Errorf("read own cgroup: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		id, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, dir, _ := strings.Cut(rest, ":")
		if id == "0" && controllers == "" {
			// The kernel appends this where the cgroup was removed under its last process.
			pl.own, pl.known = strings.TrimSuffix(dir, " (deleted)"), true
			continue
		}
		for c := range strings.SplitSeq(controllers, ",") {
			pl.v1 = append(pl.v1, v2Name(c))
		}
	}
	raw, err = os.ReadFile(h.root + "/proc/self/mountinfo")
	if err != nil {
		return pl, fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		if m, ok := parseMount(line); ok && m.kind == "cgroup2" {
			pl.mount, pl.found = m, true
			break
		}
	}
	return pl, nil
}

// v2Name gives a v1 controller the name that it has in v2.
func v2Name(c string) string {
	switch c {
	case "blkio":
		return "io"
	case "cpuacct":
		return "cpu"
	}
	return c
}

// mountPoint is a line of mountinfo (proc_pid_mountinfo(5)).
type mountPoint struct {
	root, point, kind string
	readOnly          bool
}

func parseMount(line string) (mountPoint, bool) {
	before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
	head, tail := strings.Fields(before), strings.Fields(after)
	if !ok || len(head) < 6 || len(tail) < 1 {
		return mountPoint{}, false
	}
	m := mountPoint{root: unescape(head[3]), point: unescape(head[4]), kind: tail[0]}
	m.readOnly = slices.Contains(strings.Split(head[5], ","), "ro")
	if len(tail) > 2 {
		m.readOnly = m.readOnly || slices.Contains(strings.Split(tail[2], ","), "ro")
	}
	return m, true
}

// unescape resolves the four octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// candidates lists this process's cgroup and the ancestors that a node may be put into, nearest first: up to the
// innermost systemd unit, since what is above a unit belongs to the systemd that made it, or up to the root
// where there is no systemd.
func candidates(own string) []string {
	own = path.Clean("/" + own)
	list := []string{own}
	for p := own; p != "/" && !isUnit(path.Base(p)); {
		p = path.Dir(p)
		list = append(list, p)
	}
	return list
}

func isUnit(name string) bool {
	switch path.Ext(name) {
	case ".service", ".scope", ".slice", ".socket", ".mount", ".swap":
		return true
	}
	return false
}
