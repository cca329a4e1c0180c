package pod

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/e2e/crash"
	"github.com/coracle-cri/coracle/netslirp"
)

// A nsSet says which namespaces to make, where to pin each, and what to write inside.
type nsSet struct {
	kinds    []nsKind
	hostname string // written where a UTS namespace is made
	sysctls  map[string]string
}

type nsKind struct {
	name string // as in /proc/thread-self/ns
	flag int
	pin  string // the file that the namespace is bound on
}

// ownNamespaces lists what this pod has of its own. The UTS namespace goes with the network, as the CRI has no
// mode for it and the hostname of a host-network pod is the node's.
func (p *pod) ownNamespaces() nsSet {
	set := nsSet{hostname: p.spec.Hostname}
	if !p.hostNetwork() {
		set.kinds = append(set.kinds,
			nsKind{"net", unix.CLONE_NEWNET, p.nsPath("net")},
			nsKind{"uts", unix.CLONE_NEWUTS, p.nsPath("uts")})
	}
	if !p.hostIPC() {
		set.kinds = append(set.kinds, nsKind{"ipc", unix.CLONE_NEWIPC, p.nsPath("ipc")})
	}
	set.sysctls, _ = splitSysctls(p.spec.Config.GetLinux().GetSysctls())
	return set
}

// make creates the namespaces with one thread that ends afterwards, and pins them: a bind mount of the nsfs
// file keeps a namespace alive without a process in it.
func (set nsSet) make() error {
	flags := 0
	for _, k := range set.kinds {
		flags |= k.flag
		if err := touch(k.pin); err != nil {
			return err
		}
	}
	if flags == 0 {
		return nil
	}
	return netslirp.OnOwnThread(func() error {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("unshare pod namespaces: %w", err)
		}
		crash.Point("pod/namespaces-made")
		if flags&unix.CLONE_NEWUTS != 0 {
			if err := unix.Sethostname([]byte(set.hostname)); err != nil {
				return fmt.Errorf("set hostname %q: %w", set.hostname, err)
			}
		}
		if err := writeSysctls(set.sysctls); err != nil {
			return err
		}
		for _, k := range set.kinds {
			if err := bindNS("/proc/thread-self/ns/"+k.name, k.pin); err != nil {
				return err
			}
		}
		return nil
	})
}

func bindNS(from, pin string) error {
	if err := unix.Mount(from, pin, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin namespace %s: %w", pin, err)
	}
	crash.Point("pod/namespace-pinned")
	return nil
}

// writeLateSysctls enters the pod's network namespace for those that name an interface.
func (p *pod) writeLateSysctls() error {
	_, late := splitSysctls(p.spec.Config.GetLinux().GetSysctls())
	if len(late) == 0 {
		return nil
	}
	return netslirp.OnOwnThread(func() error {
		fd, err := unix.Open(p.nsPath("net"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return writeSysctls(late)
	})
}

// podAddresses are those of the interface that a pod's network namespace has beside loopback, IPv4 first.
func podAddresses(netNS string) (ips []string, err error) {
	err = netslirp.OnOwnThread(func() error {
		fd, err := unix.Open(netNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				ips = append(ips, n.IP.String())
			}
		}
		return nil
	})
	slices.SortStableFunc(ips, func(a, b string) int { return cmp.Compare(strings.Count(a, ":"), strings.Count(b, ":")) })
	return ips, err
}

// pinPID pins the pid namespace of a process. The start time is compared after the bind: a pid alone might
// have become somebody else's.
func pinPID(pid int, start uint64, pin string) error {
	if err := touch(pin); err != nil {
		return err
	}
	if err := bindNS(fmt.Sprintf("/proc/%d/ns/pid", pid), pin); err != nil {
		return err
	}
	if now, err := startTime(pid); err != nil || now != start {
		return errors.Join(fmt.Errorf("pin pid namespace of %d: the process is gone", pid), unpin(pin))
	}
	return nil
}

// startTime reads field 22 of /proc/PID/stat. The second field, in parentheses, may hold anything.
func startTime(pid int) (uint64, error) {
	p, err := ctr.ReadProcess(pid)
	return p.Start, err
}

// unpin unmounts everything that is mounted on path, and deletes it. Idempotent.
func unpin(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
			crash.Point("pod/unmounted")
			continue // one below may be left from a daemon that died between mount and record
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // no mount point; no file
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("delete mount point: %w", err)
			}
			crash.Point("pod/mount-point-removed")
			return nil
		default:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// pinned tells whether a namespace is mounted on path.
func pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	crash.Point("pod/mount-point-made")
	return f.Close()
}
