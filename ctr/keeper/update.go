package keeper

import (
	"errors"
	"fmt"

	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// update puts other limits on the container's cgroup, all or none of them.
func (c *container) update(r *specs.LinuxResources) error {
	c.op.Lock()
	defer c.op.Unlock()
	if c.lc == nil || c.snapshot().Exited() {
		return wire.ErrNotRunning
	}
	group, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{CgroupName: c.id, RootlessCgroups: true,
		Spec: &specs.Spec{Linux: &specs.Linux{Resources: r}}}, nil)
	if err != nil {
		return fmt.Errorf("convert resources: %w", errors.Join(err, wire.ErrBadRequest))
	}
	config := c.lc.Config()
	updated := *config.Cgroups
	group.Resources.Devices = updated.Resources.Devices
	updated.Resources = group.Resources
	config.Cgroups = &updated
	if err := c.lc.Set(config); err != nil {
		return fmt.Errorf("set resources: %w", err)
	}
	return nil
}
