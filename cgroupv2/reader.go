package cgroupv2

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// buffers hold the text of one file; the largest, memory.stat, is under 3 KiB.
var buffers = sync.Pool{New: func() any { b := make([]byte, 16<<10); return &b }}

// reader reads the files of one cgroup through its directory's descriptor, into one buffer.
type reader struct {
	dir   int
	files map[string]bool // those there can be; nil: not known
	buf   []byte
	err   error // the first that is not "nobody counts this"
}

// file returns the text of a file, valid until the next one is read; nil where nobody counts it.
func (r *reader) file(name string) []byte {
	if r.err != nil || r.files != nil && !r.files[name] {
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

// device reads a line like "8:0 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0". The kernel's other
// words, of controllers of I/O cost, are skipped, and so is a device of which nothing is told.
func (r *reader) device(name, counts []byte) (d DeviceIO, told bool) {
	major, minor, _ := bytes.Cut(name, []byte(":"))
	d.Major, d.Minor = uint32(value(r.parse(major, 1))), uint32(value(r.parse(minor, 1)))
	for field := range bytes.FieldsSeq(counts) {
		key, text, _ := bytes.Cut(field, []byte("="))
		var count *uint64
		switch string(key) {
		case "rbytes":
			count = &d.ReadBytes
		case "wbytes":
			count = &d.WriteBytes
		case "dbytes":
			count = &d.DiscardBytes
		case "rios":
			count = &d.Reads
		case "wios":
			count = &d.Writes
		default:
			continue
		}
		*count, told = value(r.parse(text, 1)), true
	}
	return d, told
}

// value is zero for what could not be parsed, which r.err tells then.
func value(n *uint64) uint64 {
	if n == nil {
		return 0
	}
	return *n
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
