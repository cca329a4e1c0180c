package keeper

import (
	"fmt"
	"os"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// unloaded is the engine of a container that was handed over and whose engine's own state is damaged. It runs on, logs,
// and ends as any other, since all that is the keeper's. Nothing else can be done with it.
type unloaded struct {
	dir    string
	cgroup string // "" where it has none
	why    error
}

func (u *unloaded) error() error { return fmt.Errorf("the container's state was damaged: %w", u.why) }

func (u *unloaded) create(ends) (child, error)         { return child{}, u.error() }
func (u *unloaded) start(<-chan struct{}) error        { return u.error() }
func (u *unloaded) exec(execution) (child, error)      { return child{}, u.error() }
func (u *unloaded) update(*specs.LinuxResources) error { return u.error() }

func (u *unloaded) destroy() error {
	if u.cgroup != "" {
		if err := cgroups.RemovePath(u.cgroup); err != nil {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	if err := os.RemoveAll(u.dir); err != nil {
		return fmt.Errorf("remove container state: %w", err)
	}
	return nil
}
