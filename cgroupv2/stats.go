package cgroupv2

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// Stats is what the kernel counted for a cgroup and all below it. A field is nil where nobody counts: the
// controller is not enabled, or the kernel was built or started without it. It is never zero for that reason.
type Stats struct {
	CPU    CPU
	Memory Memory

	CPUPressure, MemoryPressure, IOPressure *Pressure

	// By Details only:
	IO              []DeviceIO // nil also where the cgroup has done no input or output yet
	Tasks, TasksMax *uint64    // threads; TasksMax nil also where there is no limit
}

// CPU is time in nanoseconds. The first three are counted without any controller; periods are those of the cgroup's
// own quota, of which one in which it was used up is throttled.
type CPU struct {
	Usage, User, System *uint64
	Periods, Throttled  *uint64
	ThrottledTime       *uint64
}

// Memory is bytes, but for the faults and events.
type Memory struct {
	Usage      *uint64 // page cache included
	Limit      *uint64 // nil also where the cgroup itself has no limit
	WorkingSet *uint64 // usage less the inactive page cache, as cAdvisor and the kubelet reckon
	RSS        *uint64 // anonymous memory
	Swap       *uint64
	SwapLimit  *uint64 // nil also where the cgroup itself has no limit

	Faults, MajorFaults *uint64 // all faults, and those of them that waited for a disk

	Cache, MappedFile        *uint64 // page cache, and the part of it that is mapped; both with tmpfs
	ActiveFile, InactiveFile *uint64
	Kernel                   *uint64 // Linux 5.18

	// By Details only:
	Min       *uint64 // what is kept from reclaim
	Peak      *uint64 // the most that Usage ever was; Linux 5.19
	LimitHits *uint64 // how often the limit was about to be exceeded
	OOMKills  *uint64 // processes of the cgroup, or below, killed for want of memory
}

// DeviceIO is what went between the cgroup and one block device.
type DeviceIO struct {
	Major, Minor                        uint32
	ReadBytes, WriteBytes, DiscardBytes uint64
	Reads, Writes                       uint64 // operations
}

// Pressure is a pressure stall record (PSI): the time in which some or all tasks waited.
type Pressure struct {
	Some, Full PressureLine
}

// PressureLine gives averages in percent over 10, 60 and 300 s, and the time waited since the cgroup was made, ns.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64
	TotalNanos           uint64
}

// Stats reads in one pass what is asked for often: CPU time, memory and pressure. ErrNotFound where the cgroup does
// not exist.
func (t *Tree) Stats(path string) (Stats, error) { return t.stats(path, false) }

// Details reads all there is, which is about twice as many files.
func (t *Tree) Details(path string) (Stats, error) { return t.stats(path, true) }

func (t *Tree) stats(path string, details bool) (Stats, error) {
	full, err := t.inside(path)
	if err != nil {
		return Stats{}, fmt.Errorf("read cgroup stats: %w", err)
	}
	s, err := t.read(t.mount.join(full), details)
	if err != nil {
		return Stats{}, fmt.Errorf("read stats of cgroup %s: %w", full, err)
	}
	return s, nil
}

// inside checks a path of a caller.
func (t *Tree) inside(path string) (string, error) {
	if !t.Usable() {
		return "", fmt.Errorf("%w: %s", ErrNotUsable, t.reason)
	}
	return cleanPath(path, path)
}

// Processes lists the processes of a cgroup and of those below it, as this process's pid namespace numbers them.
// Zombies are not among them. ErrNotFound where the cgroup does not exist.
func (t *Tree) Processes(path string) ([]int, error) {
	full, err := t.inside(path)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	pids, err := t.mount.join(full).allProcs(nil, *buf)
	if gone(err) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("list processes of cgroup %s: %w", full, err)
	}
	return pids, nil
}

// allProcs appends the processes of the cgroup and of those below it. It is called for every container at every look, so
// it does without os.File, which would ask the poller about each cgroup file.
func (g group) allProcs(pids []int, buf []byte) ([]int, error) {
	dir, err := unix.Open(string(g), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	r := &reader{dir: dir, buf: buf}
	own, err := r.slurp(procsFile)
	if errors.Is(err, unix.EFBIG) {
		var text string // some 2,000 processes and more
		text, err = g.read(procsFile)
		own = []byte(text)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // a threaded cgroup: the kernel lists its processes in the domain above
	}
	if err != nil {
		return nil, err
	}
	for word := range bytes.FieldsSeq(own) {
		pid, err := strconv.Atoi(string(word))
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", procsFile, err)
		}
		pids = append(pids, pid)
	}
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return nil, err
	}
	if st.Nlink <= 2 {
		return pids, nil // itself and its name: no cgroup below, as with most containers, and no directory to read
	}
	below, err := g.children()
	if err != nil {
		return nil, err
	}
	for _, child := range below {
		more, err := child.allProcs(pids, buf)
		if gone(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		pids = more
	}
	return pids, nil
}

func (t *Tree) read(g group, details bool) (Stats, error) {
	dir, err := unix.Open(string(g), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if gone(err) {
		return Stats{}, ErrNotFound
	}
	if err != nil {
		return Stats{}, err
	}
	defer unix.Close(dir)
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	r := &reader{dir: dir, files: t.files, buf: *buf}

	var s Stats
	r.cpu(&s.CPU)
	if s.CPU.Usage == nil && r.err == nil {
		return Stats{}, ErrNotFound // every cgroup has cpu.stat: it was removed meanwhile
	}
	r.memory(&s.Memory)
	s.CPUPressure = r.pressure("cpu.pressure")
	s.MemoryPressure = r.pressure("memory.pressure")
	s.IOPressure = r.pressure("io.pressure")
	if details {
		r.details(&s)
	}
	return s, r.err
}

func (r *reader) cpu(c *CPU) {
	r.table("cpu.stat", func(key, value []byte) {
		switch string(key) {
		case "usage_usec":
			c.Usage = r.parse(value, 1000)
		case "user_usec":
			c.User = r.parse(value, 1000)
		case "system_usec":
			c.System = r.parse(value, 1000)
		case "nr_periods":
			c.Periods = r.parse(value, 1)
		case "nr_throttled":
			c.Throttled = r.parse(value, 1)
		case "throttled_usec":
			c.ThrottledTime = r.parse(value, 1000)
		}
	})
}

func (r *reader) memory(m *Memory) {
	if m.Usage = r.number("memory.current"); m.Usage == nil {
		return // no memory controller
	}
	m.Limit = r.number("memory.max")
	m.Swap, m.SwapLimit = r.number("memory.swap.current"), r.number("memory.swap.max")
	r.table("memory.stat", func(key, value []byte) {
		switch string(key) {
		case "anon":
			m.RSS = r.parse(value, 1)
		case "file":
			m.Cache = r.parse(value, 1)
		case "file_mapped":
			m.MappedFile = r.parse(value, 1)
		case "kernel":
			m.Kernel = r.parse(value, 1)
		case "active_file":
			m.ActiveFile = r.parse(value, 1)
		case "inactive_file":
			m.InactiveFile = r.parse(value, 1)
		case "pgfault":
			m.Faults = r.parse(value, 1)
		case "pgmajfault":
			m.MajorFaults = r.parse(value, 1)
		}
	})
	if m.InactiveFile != nil {
		set := *m.Usage - min(*m.InactiveFile, *m.Usage)
		m.WorkingSet = &set
	}
}

func (r *reader) details(s *Stats) {
	s.Memory.Min, s.Memory.Peak = r.number("memory.min"), r.number("memory.peak")
	r.table("memory.events", func(key, value []byte) {
		switch string(key) {
		case "max":
			s.Memory.LimitHits = r.parse(value, 1)
		case "oom_kill":
			s.Memory.OOMKills = r.parse(value, 1)
		}
	})
	s.Tasks, s.TasksMax = r.number("pids.current"), r.number("pids.max")
	r.table("io.stat", func(device, counts []byte) {
		if d, ok := r.device(device, counts); ok {
			s.IO = append(s.IO, d)
		}
	})
}
