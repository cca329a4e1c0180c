package cgroupv2

import "errors"

var (
	// ErrNoDelegation says that there is no subtree to take.
	ErrNoDelegation = errors.New("no cgroup v2 subtree is delegated to this user")
	// ErrNotUsable says that inside the namespaces no writable cgroup v2 tree is mounted.
	ErrNotUsable = errors.New("no usable cgroup v2 tree")
	// ErrNotFound says that a cgroup does not exist (any more).
	ErrNotFound = errors.New("no such cgroup")
	// ErrInvalidPath says that a cgroup path or a name leads out of where it may.
	ErrInvalidPath = errors.New("invalid cgroup path")
	// ErrInternalProcesses says that controllers were to be enabled in a cgroup that has processes of its own.
	ErrInternalProcesses = errors.New("the cgroup has processes of its own, so the kernel enables no controllers in it")
	// ErrBusy says that processes still lived in a cgroup when the deadline passed.
	ErrBusy = errors.New("the cgroup still has processes")
)
