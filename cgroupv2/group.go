package cgroupv2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	procsFile   = "cgroup.procs"
	subtreeFile = "cgroup.subtree_control"
	// self is what cgroup.procs takes for "the process that writes": no pid, so no pid namespace to mistake.
	self = "0"
	// removeDeadline bounds kill, wait and rmdir of one tree: a killed process leaves within milliseconds unless
	// it hangs in the kernel (a dead NFS server), and then it must not hang us.
	removeDeadline = 10 * time.Second
	// pauseMin and pauseMax are the steps between two looks at a dying cgroup. Notifications of cgroup.events
	// are held back for 10 ms by the kernel; a killed container is gone in under one.
	pauseMin, pauseMax = 200 * time.Microsecond, 10 * time.Millisecond
)

// group is the absolute directory of one cgroup.
type group string

func (g group) join(name string) group { return group(filepath.Join(string(g), name)) }

func (g group) read(file string) (string, error) {
	raw, err := os.ReadFile(filepath.Join(string(g), file))
	return strings.TrimSpace(string(raw)), err
}

// write writes a value by one write(2), as the kernel's parsers ask, and never creates the file: in a cgroup a
// missing file is a missing controller.
func (g group) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(string(g), file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func (g group) exists() bool {
	info, err := os.Stat(string(g))
	return err == nil && info.IsDir()
}

// procs lists the processes of the cgroup itself. A process outside our pid namespace reads as 0.
func (g group) procs() ([]int, error) {
	raw, err := g.read(procsFile)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for word := range strings.FieldsSeq(raw) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("parse %s of %s: %w", procsFile, g, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// children lists the cgroups directly below; none where the cgroup is gone.
func (g group) children() ([]group, error) {
	entries, err := os.ReadDir(string(g))
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	var below []group
	for _, e := range entries {
		if e.IsDir() {
			below = append(below, g.join(e.Name()))
		}
	}
	return below, nil
}

// gone tells the errors of a cgroup that was removed: ENOENT by path, ENODEV through an open descriptor.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// take moves a process into the cgroup: its pid, or self. The kernel asks for write permission on cgroup.procs
// here and on that of the common ancestor of the old place and this one.
func (g group) take(pid string) error {
	if err := g.write(procsFile, pid); err != nil {
		return fmt.Errorf("move process into cgroup: %w", err)
	}
	return nil
}

// available lists the controllers that can be enabled for the children of the cgroup.
func (g group) available() ([]string, error) {
	raw, err := g.read("cgroup.controllers")
	if err != nil {
		return nil, fmt.Errorf("list controllers: %w", err)
	}
	return strings.Fields(raw), nil
}

// inForce lists the controllers that are enabled for the children of the cgroup.
func (g group) inForce() ([]string, error) {
	raw, err := g.read(subtreeFile)
	if err != nil {
		return nil, fmt.Errorf("list enabled controllers: %w", err)
	}
	return strings.Fields(raw), nil
}

// enable enables the wanted controllers for the children of the cgroup, and returns those that it newly enabled.
// They are written one by one, because the kernel takes a line whole or not at all. The cgroup must have no
// processes: the kernel refuses most controllers then, and the few threaded ones (cpu, pids, cpuset) it would
// accept by turning every child into an invalid domain that takes no process.
func (g group) enable(wanted []string) ([]string, error) {
	if len(wanted) == 0 {
		return nil, nil
	}
	have, err := g.inForce()
	if err != nil {
		return nil, err
	}
	missing := slices.DeleteFunc(slices.Clone(wanted), func(c string) bool { return slices.Contains(have, c) })
	if len(missing) == 0 {
		return nil, nil
	}
	pids, err := g.procs()
	if err != nil {
		return nil, err
	}
	if len(pids) > 0 {
		return nil, fmt.Errorf("enable controllers in %s: %w", g, ErrInternalProcesses)
	}
	var added []string
	var errs []error
	for _, c := range missing {
		if err := g.write(subtreeFile, "+"+c); err != nil {
			errs = append(errs, fmt.Errorf("enable controller %s: %w", c, err))
			continue
		}
		added = append(added, c)
	}
	// A process that got in between the look and the write: undo the threaded mode that it caused.
	if kind, err := g.read("cgroup.type"); err == nil && kind != "domain" {
		return nil, errors.Join(fmt.Errorf("enable controllers in %s: %w", g, ErrInternalProcesses), g.disable(added))
	}
	return added, errors.Join(errs...)
}

// disable takes controllers from the children. One that a child has enabled for its own children is in use
// (EBUSY) and stays.
func (g group) disable(controllers []string) error {
	var errs []error
	for _, c := range controllers {
		if err := g.write(subtreeFile, "-"+c); err != nil && !errors.Is(err, unix.EBUSY) && !gone(err) {
			errs = append(errs, fmt.Errorf("disable controller %s: %w", c, err))
		}
	}
	return errors.Join(errs...)
}

// mkdir makes the cgroup and tells whether it was not there before.
func (g group) mkdir() (bool, error) {
	err := os.Mkdir(string(g), 0o755)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make cgroup: %w", err)
	}
	return true, nil
}

// rmdir removes one cgroup that has neither processes nor children; one that is gone is no error.
func (g group) rmdir() error {
	err := unix.Rmdir(string(g))
	if err == nil || gone(err) {
		return nil
	}
	return fmt.Errorf("remove cgroup %s: %w", g, err)
}
