package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// cgroupRoot is where a node has its cgroup2 tree.
const cgroupRoot = "/sys/fs/cgroup"

// membership is how the processes of a container are told from all others.
type membership struct {
	// ownPID: the container has a pid namespace of its own, so that the kernel kills all with its init
	// (pid_namespaces(7)).
	ownPID bool
	// mountNS names its mount namespace, which is its own in any case. mounts holds it: the kernel gives the name
	// of a namespace that has ended to another one. nil once the container has no process any more.
	mountNS string
	mounts  *os.File
	// cgroup is its directory in the cgroup2 tree, "" where it has none of its own.
	cgroup string
}

func membershipOf(c child, spec *specs.Spec) (membership, error) {
	if c.signal != nil {
		return membership{}, nil // its processes live in a sandbox, which ends them
	}
	pid := c.pid
	m := membership{mountNS: mountNS(pid)}
	if m.mountNS == "" || m.mountNS == mountNS(os.Getpid()) {
		return m, errors.New("container has no mount namespace of its own")
	}
	mounts, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return m, fmt.Errorf("hold mount namespace: %w", err)
	}
	m.mounts = mounts
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace && ns.Path == "" {
			m.ownPID = true
		}
	}
	m.cgroup = ownCgroup(pid)
	return m, nil
}

// release lets the mount namespace go, and with it the container's mounts.
func (m *membership) release() {
	if m.mounts == nil {
		return
	}
	_ = m.mounts.Close() // read only
	m.mounts = nil
}

// ownCgroup returns the directory of the process's cgroup, if that is a cgroup2 one which was made for the
// container and in which the keeper itself is not: what is written to its cgroup.kill spares nobody.
func ownCgroup(pid int) string {
	if !cgroups.IsCgroup2UnifiedMode() {
		return ""
	}
	theirs, ours := cgroup2Of(pid), cgroup2Of(os.Getpid())
	if theirs == "" || theirs == "/" || ours == "" || within(ours, theirs) {
		return ""
	}
	dir := filepath.Join(cgroupRoot, theirs)
	if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err != nil {
		return ""
	}
	return dir
}

// cgroup2Of returns a process's cgroup in the cgroup2 tree, "" where there is none.
func cgroup2Of(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(raw)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	return ""
}
