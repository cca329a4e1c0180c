package rootless

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Lives tells whether the node has a parent, whatever became of its record and wherever its data is: RootlessKit's holds a
// lock in the runtime directory, and then serves its API there. The lock is looked for and not tried: a node that is just
// starting tries it once, and must not find it taken.
func (n Node) Lives() bool {
	if len(holders(n.parentLock())) > 0 {
		return true
	}
	conn, err := net.DialTimeout("unix", n.APISocket(), time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Find is ReadRecord for those who want the node that runs, whatever became of its record: where that cannot be read, the
// parent is found by its locks, which it alone holds. fs.ErrNotExist where the node is not up.
func (n Node) Find() (Record, error) {
	record, err := n.ReadRecord()
	if err == nil {
		return record, nil
	}
	pid, start := n.lockHolder()
	if pid == 0 {
		return record, err
	}
	if err := n.elsewhere(pid); err != nil {
		return record, err
	}
	unknown := fmt.Sprintf("unknown: %v", err)
	return Record{Version: recordVersion, Name: n.Name, PID: pid, PIDStart: start, Program: "?", Driver: "?", CgroupFound: unknown}, nil
}

// ErrElsewhere is that the node runs with another runtime directory: nothing reaches it from here.
var ErrElsewhere = errors.New("the node was started with another XDG_RUNTIME_DIR")

// Elsewhere is ErrElsewhere, with what to do, where the node lives and has another runtime directory than n.
func (n Node) Elsewhere() error {
	pid, _ := n.lockHolder()
	if pid == 0 {
		return nil
	}
	return n.elsewhere(pid)
}

// elsewhere is Elsewhere for the node's parent, which has its runtime directory locked. One that is gone says nothing, and a
// parent of an earlier version locks none.
func (n Node) elsewhere(parent int) error {
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", parent))
	if err != nil {
		return err
	}
	for _, link := range links {
		dir, err := os.Readlink(link)
		if err != nil || !locked(link) {
			continue
		}
		theirs, err := os.Stat(dir)
		if err != nil || !theirs.IsDir() {
			continue
		}
		if ours, err := os.Stat(n.RuntimeDir); err != nil || !os.SameFile(ours, theirs) {
			return fmt.Errorf("%w: it is in %s; to reach it, run: export XDG_RUNTIME_DIR=%s", ErrElsewhere, dir, filepath.Dir(dir))
		}
	}
	return nil
}

// lockHolder finds another process that has one of a parent's locks; 0 where there is none.
func (n Node) lockHolder() (pid int, start uint64) {
	for _, pid := range holders(n.lockFile(), n.parentLock()) {
		if pid == os.Getpid() {
			continue
		}
		if start, err := pidStart(pid); err == nil {
			return pid, start
		}
	}
	return 0, 0
}

// holders finds the processes of this user that have one of these files to themselves. By its name in /proc alone a file may
// be another's, in a container that has such a directory, too.
func holders(files ...string) (pids []int) {
	locks := map[string]os.FileInfo{}
	for _, file := range files {
		if lock, err := filepath.EvalSymlinks(file); err == nil {
			if info, err := os.Stat(lock); err == nil {
				locks[lock] = info
			}
		}
	}
	if len(locks) == 0 {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || locks[to] == nil || !locked(link) {
			continue
		}
		if info, err := os.Stat(link); err != nil || !os.SameFile(info, locks[to]) {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(link, "/")[2]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// locked tells whether the descriptor, a path of /proc, has its file to itself (proc_pid_fdinfo(5)): who is only looking
// whether another has the lock has not.
func locked(descriptor string) bool {
	info, err := os.ReadFile(strings.Replace(descriptor, "/fd/", "/fdinfo/", 1))
	return err == nil && bytes.Contains(info, []byte("FLOCK")) && bytes.Contains(info, []byte("WRITE"))
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
