package cgroupv2

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupMount = "/sys/fs/cgroup"

// MountInside mounts, in the node's mount and cgroup namespaces, the node's own cgroup tree on /sys/fs/cgroup.
// What the host shows there, v1 or v2, disappears under a tmpfs first: a cgroup2 right above a cgroup2 is EBUSY.
// Where it is mounted already it does nothing.
func MountInside() error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("mount cgroup2: %w", err)
	}
	if mountedInside(string(raw)) {
		return nil
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", cgroupMount, "tmpfs", flags, "size=4k,mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", cgroupMount, err)
	}
	if err := unix.Mount("cgroup2", cgroupMount, "cgroup2", flags, ""); err != nil {
		return errors.Join(fmt.Errorf("mount cgroup2 on %s: %w", cgroupMount, err), unix.Unmount(cgroupMount, unix.MNT_DETACH))
	}
	return nil
}

// mountedInside tells whether the topmost mount on /sys/fs/cgroup is a cgroup2 whose root is that of our cgroup
// namespace, lying on a tmpfs of ours: mountinfo shows roots relative to the namespace, so that the host's own
// mount reads "/../..". The tmpfs tells it from the host's mount where no cgroup namespace was made.
func mountedInside(mountinfo string) bool {
	var top, below mountPoint
	for line := range strings.Lines(mountinfo) {
		if m, ok := parseMount(line); ok && m.point == cgroupMount {
			top, below = m, top
		}
	}
	return top.kind == "cgroup2" && top.root == "/" && below.kind == "tmpfs"
}
