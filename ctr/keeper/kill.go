package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// killAll kills every process of the container that the kernel can be told of at once: by its cgroup, or by the
// init of its own pid namespace. Where there is neither, what the walk finds is killed.
func (c *container) killAll() error {
	c.doomed.Store(true)
	if c.child.signal != nil {
		return c.child.signal(unix.SIGKILL, true)
	}
	err := c.init.signal(unix.SIGKILL)
	switch {
	case c.member.cgroup != "":
		return errors.Join(err, killCgroup(c.member.cgroup))
	case c.member.ownPID:
		return err
	}
	members, merr := c.members()
	signalProcs(members, unix.SIGKILL)
	return errors.Join(err, merr)
}

// empty kills and reaps what the init process has left, until nothing is, and gives the mount namespace free. It
// runs after the end of the init process, once to the good end.
func (c *container) empty() error {
	if c.member.mounts == nil {
		return nil // done
	}
	if c.member.cgroup != "" {
		if err := killCgroup(c.member.cgroup); err != nil {
			return err
		}
	}
	if !c.member.ownPID {
		if err := killUntilNone(c.members, c.keeper.children.reap); err != nil {
			return err
		}
		c.keeper.children.reapOrphans()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.member.release()
	return nil
}

// members lists the live processes of the container: those in its mount namespace, those that descend from them,
// and those in its cgroup. Without a cgroup one kind escapes: an orphan with CAP_SYS_ADMIN that has made itself a
// mount namespace, in a container that shares the node's pid namespace.
func (c *container) members() ([]proc, error) {
	all, err := allProcs()
	if err != nil {
		return nil, err
	}
	group := strings.TrimPrefix(c.member.cgroup, cgroupRoot)
	found := family(all, func(p proc) bool {
		return mountNS(p.pid) == c.member.mountNS || group != "" && within(cgroup2Of(p.pid), group)
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member.mounts == nil {
		return nil, nil // released: its name may have been another namespace's already while we looked
	}
	return found, nil
}

// endStrays ends what a failed exec has left, as where a runtime program is killed after it has made the process. That is
// all in its cgroup; without one, the children of the keeper in the container that are younger than since and that nobody
// knows, with their descendants. Nobody else's are among them, as no exec of the container is being made meanwhile. Only
// where orphans come to the keeper, in the node's pid namespace, one that another exec has left just now looks the same.
func (c *container) endStrays(cgroup string, since uint64) error {
	if cgroup != "" {
		if err := killCgroup(cgroup); err != nil {
			return err
		}
	}
	c.making.Lock()
	defer c.making.Unlock()
	strays := func() ([]proc, error) {
		members, err := c.members()
		return family(members, func(p proc) bool {
			return p.parent == os.Getpid() && p.start >= since && !c.keeper.children.own(p.pid)
		}), err
	}
	err := holdStill(strays)
	if err == nil {
		err = killUntilNone(strays, c.keeper.children.reap)
	}
	if err != nil {
		return fmt.Errorf("end what is left of an exec: %w", err)
	}
	return nil
}

func within(path, group string) bool { return path == group || strings.HasPrefix(path, group+"/") }

// killCgroup kills what is in a cgroup and below, forks in progress included: cgroup.kill, Linux 5.14.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil // gone, or an older kernel: the walk finds what is left
}

// oomKilled tells whether the kernel has killed a process of the cgroup, or below, for want of memory. Where no
// memory controller is in force the file does not exist.
func oomKilled(cgroup string) bool {
	if cgroup == "" {
		return false
	}
	raw, err := os.ReadFile(filepath.Join(cgroup, "memory.events"))
	if err != nil {
		return false
	}
	for line := range bytes.Lines(raw) {
		if count, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("oom_kill ")); ok {
			n, err := strconv.ParseUint(string(count), 10, 64)
			return err == nil && n > 0
		}
	}
	return false
}
