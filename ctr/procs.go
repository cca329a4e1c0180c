package ctr

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
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
func ReadProcess(pid int) (p Process, err error) {
	err = readProc(pid, "stat", func(raw []byte) error {
		p, err = parseStat(pid, string(raw))
		return err
	})
	return p, err
}

func parseStat(pid int, stat string) (Process, error) {
	// Field 2 is the name in parentheses, and may contain any of both.
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 20 {
		return Process{}, fmt.Errorf("%d fields", len(f))
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
	return p, errors.Join(errs...)
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
	err = readProc(pid, "smaps_rollup", func(raw []byte) error {
		for line := range bytes.Lines(raw) {
			key, rest, _ := bytes.Cut(line, []byte(":"))
			if string(key) != "Pss" && string(key) != "Pss_Anon" {
				continue
			}
			kib, err := strconv.ParseUint(string(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte(" kB"))), 10, 64)
			if err != nil {
				return err
			}
			if string(key) == "Pss" {
				resident = kib << 10
			} else {
				anonymous = kib << 10
			}
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	return resident, anonymous, err
}

// ProcessFiles counts the open files of a process, and those of them that are sockets. A process that has ended has none.
func ProcessFiles(pid int) (files, sockets uint64, err error) {
	var dir int
	err = ignoringEINTR(func() (err error) {
		dir, err = unix.Open(fmt.Sprintf("/proc/%d/fd", pid), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("count open files of process %d: %w", pid, err)
	}
	defer unix.Close(dir)
	entries := texts.Get().(*[]byte)
	defer texts.Put(entries)
	var names []string
	for {
		var n int
		err := ignoringEINTR(func() (err error) {
			n, err = unix.ReadDirent(dir, *entries)
			return err
		})
		if errors.Is(err, fs.ErrNotExist) || err == nil && n == 0 {
			return files, sockets, nil // the end, or that of the process
		}
		if err != nil {
			return 0, 0, fmt.Errorf("count open files of process %d: %w", pid, err)
		}
		_, _, names = unix.ParseDirent((*entries)[:n], -1, names[:0])
		for _, name := range names {
			var target [8]byte // only its beginning counts
			n, err := unix.Readlinkat(dir, name, target[:])
			if err != nil {
				continue // closed meanwhile
			}
			files++
			if string(target[:n]) == "socket:[" {
				sockets++
			}
		}
	}
}

// texts hold a file of /proc; they are read for every process of every container at every look.
var texts = sync.Pool{New: func() any { b := make([]byte, 4<<10); return &b }}

// readProc calls parse with the text of a file, which is under 4 KiB. It does without os.File, which would ask the poller
// about each of them.
func readProc(pid int, file string, parse func([]byte) error) error {
	text := texts.Get().(*[]byte)
	defer texts.Put(text)
	n, err := slurp(fmt.Sprintf("/proc/%d/%s", pid, file), *text)
	if errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist // it ended between open and read; or it is a zombie, which has no memory
	}
	if err == nil {
		err = parse((*text)[:n])
	}
	if err != nil {
		return fmt.Errorf("read %s of process %d: %w", file, pid, err)
	}
	return nil
}

func slurp(path string, buf []byte) (n int, err error) {
	var fd int
	err = ignoringEINTR(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	for {
		var got int
		err = ignoringEINTR(func() (err error) {
			got, err = unix.Read(fd, buf[n:])
			return err
		})
		if err != nil || got == 0 {
			return n, err
		}
		if n += got; n == len(buf) {
			return n, unix.EFBIG
		}
	}
}

// ignoringEINTR repeats a call that Go's preemption signal cut short.
func ignoringEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
