package cgroupv2

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Stats is what the kernel counted for a cgroup and all below it. A field is nil where nobody counts: the
// controller is not enabled, or the kernel was built or started without it. It is never zero for that reason.
type Stats struct {
	CPUUsageNanos *uint64 // CPU time, ns; counted without any controller

	MemoryUsage     *uint64 // bytes, page cache included
	MemoryLimit     *uint64 // bytes; nil also where the cgroup itself has no limit
	WorkingSet      *uint64 // bytes: usage less the inactive page cache, as cAdvisor and the kubelet reckon
	RSS             *uint64 // bytes of anonymous memory
	PageFaults      *uint64 // all of them, minor and major
	MajorPageFaults *uint64
	SwapUsage       *uint64 // bytes
	OOMKills        *uint64 // processes of the cgroup, or below, killed for want of memory

	Pids *uint64 // tasks: threads count, too

	CPUPressure, MemoryPressure, IOPressure *Pressure
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

// Stats reads the cgroup in one pass. ErrNotFound where it does not exist.
func (t *Tree) Stats(pod string) (Stats, error) {
	if !t.Usable() {
		return Stats{}, fmt.Errorf("read cgroup stats: %w: %s", ErrNotUsable, t.reason)
	}
	full, err := cleanPath(pod, pod)
	if err != nil {
		return Stats{}, fmt.Errorf("read cgroup stats: %w", err)
	}
	s, err := t.mount.join(full).stats()
	if err != nil {
		return Stats{}, fmt.Errorf("read stats of cgroup %s: %w", full, err)
	}
	return s, nil
}

// buffers hold the text of one file; the largest, memory.stat, is under 3 KiB.
var buffers = sync.Pool{New: func() any { b := make([]byte, 16<<10); return &b }}

// reader reads the files of one cgroup through its directory's descriptor, into one buffer.
type reader struct {
	dir int
	buf []byte
	err error // the first that is not "nobody counts this"
}

func (g group) stats() (Stats, error) {
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
	r := &reader{dir: dir, buf: *buf}

	var s Stats
	r.cpu(&s)
	if s.CPUUsageNanos == nil && r.err == nil {
		return Stats{}, ErrNotFound // every cgroup has cpu.stat: it was removed meanwhile
	}
	r.memory(&s)
	s.Pids = r.number("pids.current")
	s.CPUPressure = r.pressure("cpu.pressure")
	s.MemoryPressure = r.pressure("memory.pressure")
	s.IOPressure = r.pressure("io.pressure")
	return s, r.err
}

func (r *reader) cpu(s *Stats) {
	r.table("cpu.stat", func(key, value []byte) {
		if string(key) == "usage_usec" {
			s.CPUUsageNanos = r.parse(value, 1000)
		}
	})
}

func (r *reader) memory(s *Stats) {
	s.MemoryUsage = r.number("memory.current")
	if s.MemoryUsage == nil {
		return // no memory controller: five opens saved
	}
	s.MemoryLimit = r.number("memory.max")
	s.SwapUsage = r.number("memory.swap.current")
	r.table("memory.stat", func(key, value []byte) {
		switch string(key) {
		case "anon":
			s.RSS = r.parse(value, 1)
		case "pgfault":
			s.PageFaults = r.parse(value, 1)
		case "pgmajfault":
			s.MajorPageFaults = r.parse(value, 1)
		case "inactive_file":
			if inactive := r.parse(value, 1); inactive != nil {
				set := *s.MemoryUsage - min(*inactive, *s.MemoryUsage)
				s.WorkingSet = &set
			}
		}
	})
	r.table("memory.events", func(key, value []byte) {
		if string(key) == "oom_kill" {
			s.OOMKills = r.parse(value, 1)
		}
	})
}

// file returns the text of a file, valid until the next one is read; nil where nobody counts it.
func (r *reader) file(name string) []byte {
	if r.err != nil {
		return nil
	}
	text, err := r.slurp(name)
	switch {
	case err == nil:
		return text
	case gone(err), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		// No such controller, or PSI switched off (EOPNOTSUPP); EINVAL from a threaded cgroup's domain files.
		return nil
	}
	r.err = fmt.Errorf("read %s: %w", name, err)
	return nil
}

func (r *reader) slurp(name string) ([]byte, error) {
	fd, err := retry(func() (int, error) { return unix.Openat(r.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for n := 0; ; {
		if n == len(r.buf) {
			return nil, unix.EFBIG
		}
		got, err := retry(func() (int, error) { return unix.Read(fd, r.buf[n:]) })
		if err != nil {
			return nil, err
		}
		if got == 0 {
			return bytes.TrimSpace(r.buf[:n]), nil
		}
		n += got
	}
}

// retry repeats a call that Go's preemption signal cut short.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// number reads a file of one number; nil for "max".
func (r *reader) number(name string) *uint64 {
	text := r.file(name)
	if len(text) == 0 || string(text) == "max" {
		return nil
	}
	return r.parse(text, 1)
}

// table reads a file of lines "key value".
func (r *reader) table(name string, each func(key, value []byte)) {
	for line := range bytes.Lines(r.file(name)) {
		if key, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" ")); ok {
			each(key, value)
		}
	}
}

func (r *reader) parse(text []byte, factor uint64) *uint64 {
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil {
		r.err = errors.Join(r.err, fmt.Errorf("parse cgroup file: %w", err))
		return nil
	}
	n *= factor
	return &n
}

// pressure reads lines like "some avg10=0.00 avg60=0.12 avg300=0.05 total=1234", the total in microseconds.
func (r *reader) pressure(name string) *Pressure {
	var p *Pressure
	r.table(name, func(key, value []byte) {
		if p == nil {
			p = &Pressure{}
		}
		switch string(key) {
		case "some":
			p.Some = r.pressureLine(value)
		case "full":
			p.Full = r.pressureLine(value)
		}
	})
	return p
}

func (r *reader) pressureLine(text []byte) PressureLine {
	var l PressureLine
	for field := range bytes.FieldsSeq(text) {
		key, value, _ := bytes.Cut(field, []byte("="))
		if string(key) == "total" {
			if n := r.parse(value, 1000); n != nil {
				l.TotalNanos = *n
			}
			continue
		}
		avg, err := strconv.ParseFloat(string(value), 64)
		if err != nil {
			r.err = errors.Join(r.err, fmt.Errorf("parse cgroup file: %w", err))
		}
		switch string(key) {
		case "avg10":
			l.Avg10 = avg
		case "avg60":
			l.Avg60 = avg
		case "avg300":
			l.Avg300 = avg
		}
	}
	return l
}
