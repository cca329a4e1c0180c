package cgroupv2

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/opencontainers/cgroups"
)

// SetCPUShares gives a pod's cgroup the cpu.weight that stands for shares of cgroup v1 (2 to 262144; 0 changes
// nothing), by the conversion that libcontainer uses for containers: 1024 is 100, the default of both scales. Without
// the cpu controller it does nothing. ErrNotFound where the cgroup does not exist.
func (t *Tree) SetCPUShares(pod string, shares uint64) error {
	if !t.Usable() || shares == 0 || !slices.Contains(t.controllers, "cpu") {
		return nil
	}
	full, err := cleanPath(pod, pod)
	if err == nil {
		err = t.mount.join(full).write("cpu.weight", strconv.FormatUint(cgroups.ConvertCPUSharesToCgroupV2Value(shares), 10))
	}
	if gone(err) {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("set cpu weight of %s: %w", pod, err)
	}
	return nil
}
