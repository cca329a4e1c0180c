// Package settle gives back what a program's start took and its life does not need. Every process of a node starts within
// 100 ms, with a great part of its program and a heap for it, and then waits most of the time.
package settle

import (
	"debug/elf"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process settles when it has worked for more than worked since it did so last, and for less than rested in the last
// period. A start is over within the first one, also on a busy machine.
const (
	period = 10 * time.Second
	first  = 2 * time.Second
	worked = 50 * time.Millisecond
	rested = 20 * time.Millisecond
)

// InQuiet settles this process soon after its start, and again whenever it has worked and rests.
func InQuiet(log *slog.Logger) {
	go func() {
		time.Sleep(first)
		settle(log)
		settled := cpuTime()
		for last := settled; ; {
			time.Sleep(period)
			now := cpuTime()
			if now-settled > worked && now-last < rested {
				settle(log)
				now = cpuTime()
				settled = now
			}
			last = now
		}
	}()
}

func settle(log *slog.Logger) {
	debug.FreeOSMemory()
	if err := dropProgram("/proc/self/exe"); err != nil {
		log.Debug("memory is not given back", "err", err)
	}
}

// cpuTime is what all threads have used.
func cpuTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &now); err != nil {
		return 0 // it never settles again
	}
	return time.Duration(now.Nano())
}

// dropProgram unmaps the pages of this process's program, which come back from the page cache when they are used: a
// fault a 64 KiB, a few hundred microseconds in all. It is sound for what cannot be written: those pages are the file's
// (madvise(2), MADV_DONTNEED: "repopulating the memory contents from the up-to-date contents of the underlying mapped
// file"). So it takes the segments of the program that are not writable, which the relocated data (RELRO) is, and only of
// a program at a fixed address, whose headers say where they are. The file cannot have changed: ETXTBSY.
func dropProgram(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	defer f.Close()
	if f.Type != elf.ET_EXEC {
		return nil
	}
	page := uint64(os.Getpagesize())
	var errs []error
	for _, p := range f.Progs {
		from, to := p.Vaddr&^(page-1), (p.Vaddr+p.Filesz)&^(page-1) // a last page may be shared with the next segment
		if p.Type != elf.PT_LOAD || p.Flags&elf.PF_W != 0 || from >= to {
			continue
		}
		if _, _, errno := syscall.Syscall(unix.SYS_MADVISE, uintptr(from), uintptr(to-from), unix.MADV_DONTNEED); errno != 0 {
			errs = append(errs, fmt.Errorf("madvise: %w", errno))
		}
	}
	return errors.Join(errs...)
}
