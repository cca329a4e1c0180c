package main

import (
	"bufio"
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

// cgroupOf is the directory of a process's cgroup v2, or of the one above it that is called name; "" where there is none.
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
	for name != "" && filepath.Base(path) != name {
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

// cpu is the CPU time that the node has used, in seconds; false where nobody counts it.
func (n *node) cpu() (seconds float64, ok bool) {
	f, err := os.Open(filepath.Join(n.counted, "cpu.stat"))
	if n.counted == "" || err != nil {
		return 0, false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, found := strings.CutPrefix(s.Text(), "usage_usec "); found {
			usec, err := strconv.ParseFloat(rest, 64)
			return usec / 1e6, err == nil
		}
	}
	return 0, false
}
