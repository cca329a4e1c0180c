package cgroupv2

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kill sends SIGKILL to every process of the cgroup and of those below it; a cgroup that is gone is no error.
// It does not wait.
func (g group) kill() error {
	err := g.write("cgroup.kill", "1")
	if err == nil || !g.exists() {
		return nil
	}
	if gone(err) { // before Linux 5.14
		return g.killByPids()
	}
	return fmt.Errorf("kill cgroup: %w", err)
}

// killByPids kills one process after another. It cannot be fooled by a pid that is used again: the pidfd is
// opened first and the process must then still be listed. A process forked meanwhile is met by the next call;
// the callers that need an empty cgroup call until it is.
func (g group) killByPids() error {
	below, err := g.children()
	if err != nil {
		return err
	}
	var errs []error
	for _, child := range below {
		errs = append(errs, child.killByPids())
	}
	seen, err := g.procs()
	if err != nil && !gone(err) {
		errs = append(errs, err)
	}
	for _, pid := range seen {
		if pid != 0 { // 0: outside our pid namespace, and so out of our reach
			errs = append(errs, g.killOne(pid))
		}
	}
	return errors.Join(errs...)
}

func (g group) killOne(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	still, err := g.procs()
	if err != nil && !gone(err) {
		return err
	}
	if !slices.Contains(still, pid) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}

// populated tells whether a live process is in the cgroup or below it. Zombies do not count, for rmdir neither.
func (g group) populated() (bool, error) {
	raw, err := g.read("cgroup.events")
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read cgroup events: %w", err)
	}
	return slices.Contains(strings.Split(raw, "\n"), "populated 1"), nil
}

// remove kills whatever lives in the cgroup and below, waits, and removes the directories from the leaves up. It
// starts over as long as somebody puts new processes in, until the deadline. Idempotent.
func (g group) remove(deadline time.Time) error {
	for pause := pauseMin; ; pause = min(2*pause, pauseMax) {
		if err := g.kill(); err != nil {
			return err
		}
		alive, err := g.populated()
		if err != nil {
			return err
		}
		if !alive {
			err = g.rmdirAll()
			if !errors.Is(err, unix.EBUSY) {
				return err
			}
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("remove cgroup %s: %w", g, ErrBusy), err)
		}
		time.Sleep(pause)
	}
}

func (g group) rmdirAll() error {
	below, err := g.children()
	if err != nil {
		return err
	}
	for _, child := range below {
		if err := child.rmdirAll(); err != nil {
			return err
		}
	}
	return g.rmdir()
}
