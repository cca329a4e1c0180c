package ctr

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is what /proc tells of a process, as proc_pid_stat(5) has it.
type Process struct {
	Pid, Parent int
	Start       uint64 // with Pid it names the process for ever
	Threads     uint64
	// CPU is what the process has used, and what those of its children had that have ended and that it waited for.
	CPU time.Duration
	// MountNS is the inode of its mount namespace, by AllProcesses only; 0 for a zombie.
	MountNS uint64
	Zombie  bool
}

// userHZ is the unit in which the kernel tells programs of CPU time, on every architecture that Go knows.
const userHZ = 100

// ReadProcess reads one process. An error that is fs.ErrNotExist means that it has ended.
func ReadProcess(pid int) (Process, error) {
	raw, err := readProc(pid, "stat")
	if err != nil {
		return Process{}, err
	}
	// Field 2 is the name in parentheses, and may contain any of both.
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(f) < 20 {
		return Process{}, fmt.Errorf("read stat of process %d: %d fields", pid, len(f))
	}
	p := Process{Pid: pid}
	var errs []error
	number := func(field int) uint64 { // as the manual counts them
		n, err := strconv.ParseUint(f[field-3], 10, 64)
		errs = append(errs, err)
		return n
	}
	p.Parent, p.Threads, p.Start = int(number(4)), number(20), number(22)
	p.CPU = time.Duration(number(14)+number(15)+number(16)+number(17)) * (time.Second / userHZ)
	// The first thread may be a zombie while others run.
	p.Zombie = (f[0] == "Z" || f[0] == "X") && p.Threads <= 1
	if err := errors.Join(errs...); err != nil {
		return Process{}, fmt.Errorf("read stat of process %d: %w", pid, err)
	}
	return p, nil
}

// AllProcesses lists every process of the node's pid namespace.
func AllProcesses() ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := ReadProcess(pid)
		if err != nil {
			continue // ended meanwhile
		}
		p.MountNS = MountNS(pid)
		all = append(all, p)
	}
	return all, nil
}

// MountNS names the mount namespace of a process by its inode; 0 where it has none any more.
func MountNS(pid int) uint64 {
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &st) != nil {
		return 0
	}
	return st.Ino
}

// ProcessMemory is the memory of a process that is resident now, in bytes: a page that several processes have mapped is
// divided among them. Anonymous is the part of it that no file backs. A process that has ended has none.
func ProcessMemory(pid int) (resident, anonymous uint64, err error) {
	raw, err := readProc(pid, "smaps_rollup")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) { // ESRCH: a zombie
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	for line := range bytes.Lines(raw) {
		key, rest, _ := strings.Cut(string(line), ":")
		if key != "Pss" && key != "Pss_Anon" {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("read smaps_rollup of process %d: %w", pid, err)
		}
		if key == "Pss" {
			resident = kib << 10
		} else {
			anonymous = kib << 10
		}
	}
	return resident, anonymous, nil
}

// ProcessFiles counts the open files of a process, and those of them that are sockets. A process that has ended has none.
func ProcessFiles(pid int) (files, sockets uint64, err error) {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("count open files: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return 0, 0, fmt.Errorf("count open files: %w", err)
	}
	var target [8]byte // only its beginning counts
	for _, name := range names {
		n, err := unix.Readlinkat(int(dir.Fd()), name, target[:])
		if err != nil {
			continue // closed meanwhile
		}
		files++
		if string(target[:n]) == "socket:[" {
			sockets++
		}
	}
	return files, sockets, nil
}

func readProc(pid int, file string) ([]byte, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if errors.Is(err, unix.ESRCH) && file == "stat" {
		err = fs.ErrNotExist // it ended between open and read
	}
	if err != nil {
		return nil, fmt.Errorf("read %s of process %d: %w", file, pid, err)
	}
	return raw, nil
}
