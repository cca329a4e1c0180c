package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrDown says that the node does not run.
var ErrDown = errors.New("the node is not up")

// Enter replaces this process by command, inside the node's user, mount, pid, cgroup, IPC and UTS namespaces and its
// network namespace, as the node's uid 0 and in the same working directory. It returns only on error. join brings this
// process into the node's cgroup, whose path it gets, before it is in its cgroup namespace; it is not called where the
// node has none.
//
// A Go program has threads and so may not join a user namespace by itself (setns(2)): nsenter(1) does it. It is
// called twice, because the network namespace is pinned by a mount that only the node's mount namespace has.
func (n Node) Enter(join func(cgroup string), command []string) error {
	record, err := n.Find()
	if errors.Is(err, fs.ErrNotExist) || err == nil && !record.Alive() {
		return ErrDown
	}
	if err != nil {
		return err
	}
	pid, err := n.ChildPID()
	if err != nil {
		return err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("enter node: %w", err)
	}
	wd, err := os.Getwd()
	if err != nil {
		wd = "/"
	}
	if record.Cgroup != "" {
		join(record.Cgroup)
	}
	argv := []string{"nsenter", "--target", strconv.Itoa(pid), "--user", "--mount", "--pid", "--cgroup", "--ipc", "--uts", "--",
		"nsenter", "--net=" + n.NetNS(), "--", "env", "-C", wd,
		"CONTAINER_RUNTIME_ENDPOINT=" + n.Endpoint(), "IMAGE_SERVICE_ENDPOINT=" + n.Endpoint()}
	argv = append(argv, command...)
	if err := unix.Exec(nsenter, argv, os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", nsenter, err)
	}
	return nil
}
