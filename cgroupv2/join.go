package cgroupv2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Join moves this process, which is about to enter the namespaces of a running node, to the node's own processes. From
// inside it could not come there: the kernel lets nobody over the border of a cgroup namespace (cgroup-v2.rst,
// "Migration and user namespaces"). What it starts is then the node's in every account, and finds its own cgroup below
// /sys/fs/cgroup, by which a kubelet tells whether swap is under control. The kernel allows that to whoever may write
// the cgroup above both places; else systemd does it, if the node is in a unit of the user's. nodePath is that of
// NodeGroup.
func Join(nodePath string) error { return thisHost().join(nodePath) }

func (h host) join(nodePath string) error {
	leaf := h.group(nodePath + supervisor)
	err := leaf.take(self)
	if !errors.Is(err, fs.ErrPermission) || h.dial == nil {
		return err
	}
	unit := filepath.Dir(nodePath)
	if !isUnit(filepath.Base(unit)) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	m, dialErr := h.dial(ctx)
	if dialErr != nil {
		return errors.Join(err, dialErr)
	}
	defer m.close()
	return m.attach(ctx, filepath.Base(unit), strings.TrimPrefix(nodePath, unit)+supervisor, os.Getpid())
}

func (u userSystemd) attach(ctx context.Context, unit, below string, pid int) error {
	if err := u.conn.AttachProcessesToUnit(ctx, unit, below, []uint32{uint32(pid)}); err != nil {
		return fmt.Errorf("move process into %s: %w", unit, err)
	}
	return nil
}
