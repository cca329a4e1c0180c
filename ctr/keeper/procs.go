package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// proc is what /proc says of a process.
type proc struct {
	pid, parent, session int
	start                uint64
	zombie               bool
}

// readProc reads /proc/PID/stat; proc_pid_stat(5) numbers the fields.
func readProc(pid int) (proc, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return proc{}, fmt.Errorf("read stat of process %d: %w", pid, err)
	}
	// Field 2 is the name in parentheses, and may contain any of both.
	_, rest, _ := strings.Cut(string(raw[max(0, bytes.LastIndexByte(raw, ')')):]), ") ")
	f := strings.Fields(rest)
	if len(f) < 20 {
		return proc{}, fmt.Errorf("read stat of process %d: %d fields", pid, len(f))
	}
	parent, err1 := strconv.Atoi(f[1])
	session, err2 := strconv.Atoi(f[3])
	start, err3 := strconv.ParseUint(f[19], 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return proc{}, fmt.Errorf("read stat of process %d: %w", pid, err)
	}
	// The first thread may be a zombie while others run: field 20 counts them.
	zombie := (f[0] == "Z" || f[0] == "X") && (f[17] == "0" || f[17] == "1")
	return proc{pid: pid, parent: parent, session: session, start: start, zombie: zombie}, nil
}

// clock is the time in which proc.start counts: hundredths of a second since the boot (USER_HZ).
func clock() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("read clock: %w", err)
	}
	return uint64(now.Nano() / int64(10*time.Millisecond)), nil
}

// allProcs lists every process of the node's pid namespace.
func allProcs() ([]proc, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []proc
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := readProc(pid); err == nil { // an error: it has ended meanwhile
			all = append(all, p)
		}
	}
	return all, nil
}

// mountNS names the mount namespace of a process; "" where it has none any more (a zombie).
func mountNS(pid int) string {
	link, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/mnt")
	if err != nil {
		return ""
	}
	return link
}

// family selects, from all processes, those for which belongs says yes and all their descendants. Zombies are
// dead and do not count, nor does the keeper itself.
func family(all []proc, belongs func(proc) bool) []proc {
	in := map[int]bool{}
	var chosen []proc
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if in[p.pid] || p.zombie || p.pid == os.Getpid() {
				continue
			}
			if in[p.parent] || belongs(p) {
				in[p.pid], grown = true, true
				chosen = append(chosen, p)
			}
		}
	}
	return chosen
}

// signalProcs sends sig to each process that is still the one that was listed.
func signalProcs(list []proc, sig syscall.Signal) {
	for _, p := range list {
		fd, err := unix.PidfdOpen(p.pid, 0)
		if err != nil {
			continue // ended
		}
		if now, err := readProc(p.pid); err == nil && now.start == p.start {
			_ = unix.PidfdSendSignal(fd, sig, nil, 0) // ended meanwhile, at worst
		}
		_ = unix.Close(fd)
	}
}

// holdStill stops what list finds until it finds nothing more. What is stopped forks no more: else what it forks between a
// look and its death would be its heir's child, in a container's own pid namespace, and be found by nobody.
func holdStill(list func() ([]proc, error)) error {
	stopped := map[int]uint64{}
	for deadline := time.Now().Add(killTimeout); time.Now().Before(deadline); {
		found, err := list()
		if err != nil {
			return err
		}
		fresh := slices.DeleteFunc(found, func(p proc) bool { return stopped[p.pid] == p.start })
		if len(fresh) == 0 {
			return nil
		}
		signalProcs(fresh, unix.SIGSTOP)
		for _, p := range fresh {
			stopped[p.pid] = p.start
		}
	}
	return nil // they are killed nevertheless
}

// killUntilNone kills what list finds, again and again, because processes may fork while they are being listed,
// until list finds nothing and all that were killed are dead, or the time is over. reap is called for each.
func killUntilNone(list func() ([]proc, error), reap func(pid int)) error {
	deadline := time.Now().Add(killTimeout)
	killed := map[int]proc{}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		found, err := list()
		if err != nil {
			return err
		}
		signalProcs(found, unix.SIGKILL)
		for _, p := range found {
			killed[p.pid] = p
		}
		// An orphan may not be found again, and still take a moment to die.
		for pid, p := range killed {
			if now, err := readProc(pid); err != nil || now.start != p.start || now.zombie {
				reap(pid)
				delete(killed, pid)
			}
		}
		if len(found) == 0 && len(killed) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kill processes: %d still live after %s", len(killed), killTimeout)
		}
		time.Sleep(pause)
	}
}
