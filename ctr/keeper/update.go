package keeper

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// update puts other limits on the container's cgroup, all or none of them.
func (c *container) update(r *specs.LinuxResources) error {
	c.op.Lock()
	defer c.op.Unlock()
	if c.engine == nil || c.snapshot().Exited() {
		return wire.ErrNotRunning
	}
	return c.engine.update(r)
}
