package keeper

import (
	"errors"

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
	before, err := saveLimits(c.member.cgroup, r)
	if err != nil {
		return err
	}
	if err := c.engine.update(r); err != nil {
		return errors.Join(err, before.restore())
	}
	return nil
}
