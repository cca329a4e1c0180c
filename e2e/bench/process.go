package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process is one of a node's.
type process struct {
	pid  int
	comm string
}

// tree is the process root and all that descend from it.
func tree(root int) []process {
	children := map[int][]process{}
	var top process
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// pid (comm) state ppid
		raw, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		open, end := bytes.IndexByte(raw, '('), bytes.LastIndexByte(raw, ')')
		if err != nil || open < 0 || end < open {
			continue
		}
		f := strings.Fields(string(raw[end+1:]))
		p := process{pid: pid, comm: string(raw[open+1 : end])}
		if pid == root {
			top = p
		}
		if parent, err := strconv.Atoi(f[1]); err == nil {
			children[parent] = append(children[parent], p)
		}
	}
	out := []process{top}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i].pid]...)
	}
	return out
}

// field reads a line "Name:   123 kB" of a file below /proc/PID, in KiB.
func (p process) field(file, name string) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.pid, file))
	if err != nil {
		return 0, err
	}
	s := bufio.NewScanner(bytes.NewReader(raw))
	for s.Scan() {
		if rest, ok := strings.CutPrefix(s.Text(), name+":"); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("%s of process %d has no %s", file, p.pid, name)
}

// pss is the proportional set size of processes, in KiB: of the workload (whose program is sleep), and of all others.
// Of a process that may not be looked into, the resident size is taken; they are named.
func pss(all []process) (workload, others float64, guessed []string) {
	for _, p := range all {
		v, err := p.field("smaps_rollup", "Pss")
		if err != nil {
			if v, err = p.field("status", "VmRSS"); err != nil {
				continue // it has ended
			}
			guessed = append(guessed, p.comm)
		}
		if p.comm == "sleep" {
			workload += v
		} else {
			others += v
		}
	}
	return workload, others, guessed
}

// peak is a measurement of how much more memory processes take at their peak than at its beginning.
type peak map[int]float64

// startPeak forgets the peaks so far (proc(5), clear_refs).
func startPeak(all []process) peak {
	p := peak{}
	for _, one := range all {
		rss, err := one.field("status", "VmRSS")
		if err == nil && os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", one.pid), []byte("5"), 0) == nil {
			p[one.pid] = rss
		}
	}
	return p
}

// growth is the sum of the processes' growths, in KiB.
func (p peak) growth() (sum float64) {
	for pid, before := range p {
		if high, err := (process{pid: pid}).field("status", "VmHWM"); err == nil {
			sum += max(high-before, 0)
		}
	}
	return sum
}

// kill kills a process and waits for its end.
func (p process) kill() error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return fmt.Errorf("kill %s: %w", p.comm, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("kill %s: %w", p.comm, err)
	}
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
			return err
		}
	}
}
