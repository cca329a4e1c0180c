package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Find is ReadRecord for those who want the node that runs, whatever became of its record: where that cannot be read, the
// parent is found by the lock, which it alone holds. fs.ErrNotExist where the node is not up.
func (n Node) Find() (Record, error) {
	record, err := n.ReadRecord()
	if err == nil {
		return record, nil
	}
	pid, start := n.lockHolder()
	if pid == 0 {
		return record, err
	}
	unknown := fmt.Sprintf("unknown: %v", err)
	return Record{Version: recordVersion, Name: n.Name, PID: pid, PIDStart: start, Program: "?", Driver: "?", CgroupFound: unknown}, nil
}

// lockHolder finds another process that has the lock's file open; 0 where there is none.
func (n Node) lockHolder() (pid int, start uint64) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0, 0
	}
	lock, err := filepath.EvalSymlinks(n.lockFile())
	if err != nil {
		return 0, 0
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != lock {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil || pid == os.Getpid() {
			continue
		}
		if start, err := pidStart(pid); err == nil {
			return pid, start
		}
	}
	return 0, 0
}

// firstOf finds the PID 1 of the pid namespace that the node's parent has made.
func firstOf(parent int) (int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil {
		return 0, err
	}
	for _, task := range tasks {
		raw, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for _, child := range strings.Fields(string(raw)) {
			status, _ := os.ReadFile("/proc/" + child + "/status")
			for line := range strings.Lines(string(status)) {
				if f := strings.Fields(line); len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" {
					return strconv.Atoi(child)
				}
			}
		}
	}
	return 0, fmt.Errorf("find the node's PID 1 below process %d: %w", parent, fs.ErrNotExist)
}

// ChildPID is the host's pid of the node's PID 1: as RootlessKit has written it, else as it is found below the parent.
func (n Node) ChildPID() (int, error) {
	raw, err := os.ReadFile(filepath.Join(n.RootlesskitDir(), "child_pid"))
	if err == nil {
		var pid int
		if pid, err = strconv.Atoi(strings.TrimSpace(string(raw))); err == nil {
			return pid, nil
		}
	}
	record, rerr := n.Find()
	if rerr == nil && record.Alive() {
		pid, ferr := firstOf(record.PID)
		if ferr == nil {
			return pid, nil
		}
		rerr = ferr
	}
	return 0, fmt.Errorf("read the node's pid: %w", errors.Join(err, rerr))
}
