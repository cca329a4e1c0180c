package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The CPU time of a node is that of its cgroup, which counts every process that was ever in it: those of a container's
// start live for milliseconds. A cgroup v2 that this process may write is all it takes; the cpu controller is not needed.

// cgroupOf is the directory of a process's cgroup v2, or of the one above it whose name begins so; "" where there is none.
func cgroupOf(pid int, name string) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	mounts, err2 := os.ReadFile("/proc/self/mounts")
	if err != nil || err2 != nil {
		return ""
	}
	_, path, ok := strings.Cut("\n"+string(raw), "\n0::")
	if !ok {
		return ""
	}
	path = strings.TrimSpace(path)
	for name != "" && !strings.HasPrefix(filepath.Base(path), name) {
		if path = filepath.Dir(path); path == "/" || path == "." {
			return ""
		}
	}
	for mount := range strings.Lines(string(mounts)) {
		if f := strings.Fields(mount); len(f) > 2 && f[2] == "cgroup2" {
			return filepath.Join(f[1], path)
		}
	}
	return ""
}

// confine has the node's first process start in a cgroup of its own, where that can be made. release is for after the start.
func (n *node) confine() (release func(), err error) {
	n.cgroup = ""
	own := cgroupOf(os.Getpid(), "")
	dir := filepath.Join(own, "bench-"+n.name)
	if own == "" || os.Mkdir(dir, 0o755) != nil && !isDir(dir) {
		return func() {}, nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	n.cgroup = dir
	n.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	return func() { f.Close() }, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// unconfine removes the node's cgroup and what it has made in it. The last processes may be about to end.
func (n *node) unconfine() error {
	if n.cgroup == "" {
		return nil
	}
	var err error
	for range 100 {
		if err = removeCgroup(n.cgroup); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroup: %w", err)
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}

// findGroups finds the cgroups that the node's processes are in: the one that it was started in, and the one that it
// has made for itself elsewhere.
func (n *node) findGroups() error {
	n.counted = nil
	if n.cgroup == "" {
		return nil
	}
	n.counted = []string{n.cgroup}
	if n.kind.group == "" {
		return nil
	}
	server, err := n.server()
	if err != nil {
		return err
	}
	if dir := cgroupOf(server.pid, n.kind.group); dir != "" && !strings.HasPrefix(dir, n.cgroup+"/") {
		n.counted = append(n.counted, dir)
	}
	return nil
}

// cpu is the CPU time that the node has used, in seconds; false where nobody counts it.
func (n *node) cpu() (seconds float64, ok bool) {
	for _, dir := range n.counted {
		raw, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
		if err != nil {
			return 0, false
		}
		_, rest, _ := strings.Cut("\n"+string(raw), "\nusage_usec ")
		value, _, _ := strings.Cut(rest, "\n")
		usec, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, false
		}
		seconds += usec / 1e6
	}
	return seconds, len(n.counted) > 0
}
