package ctr

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// libcontainerDevices are the nodes that libcontainer makes in each container's /dev by itself. It binds them from
// the node, because mknod(2) is refused in a user namespace; it knows that it is in one by /proc/self/ns/user.
var libcontainerDevices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx"}

// devices binds the node's devices. They are mounts, not entries of linux.devices: libcontainer would bind such an
// entry from the same path on the node, and the CRI lets the two paths differ.
func (b *builder) devices() error {
	var mounts []specs.Mount
	if b.security.GetPrivileged() && !b.ownDev() {
		// "All devices from the host's /dev are available within the container" (CRI): those that this user can open.
		paths, err := b.req.Host.FS.Devices("/dev")
		if err != nil {
			return err
		}
		for _, p := range paths {
			if !slices.Contains(libcontainerDevices, p) {
				mounts = append(mounts, deviceMount(p, p))
			}
		}
	}
	for _, d := range b.req.Container.GetDevices() {
		more, err := b.device(d)
		if err != nil {
			return err
		}
		mounts = append(mounts, more...)
	}
	b.spec.Mounts = append(b.spec.Mounts, dropCovered(mounts)...)
	sortMounts(b.spec.Mounts)
	return nil
}

// ownDev tells whether the container mounts a /dev itself, in which all is that is to be there.
func (b *builder) ownDev() bool {
	return slices.ContainsFunc(b.spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev" && m.Type == "bind" })
}

// dropCovered keeps the last of the mounts on one path.
func dropCovered(mounts []specs.Mount) []specs.Mount {
	var out []specs.Mount
	for i, m := range mounts {
		later := slices.ContainsFunc(mounts[i+1:], func(o specs.Mount) bool { return o.Destination == m.Destination })
		if !later {
			out = append(out, m)
		}
	}
	return out
}

func deviceMount(source, destination string) specs.Mount {
	return specs.Mount{Destination: destination, Type: "bind", Source: source, Options: []string{"bind", "rprivate"}}
}

// device makes the mounts of one device, or of each in a directory of devices.
func (b *builder) device(d *runtimeapi.Device) ([]specs.Mount, error) {
	host, inside := d.GetHostPath(), d.GetContainerPath()
	if inside == "" {
		inside = host
	}
	if !filepath.IsAbs(host) || !filepath.IsAbs(inside) || filepath.Clean(inside) == "/" {
		return nil, invalid("device %q at %q: both paths must be absolute", host, inside)
	}
	if err := b.devicePermissions(d); err != nil {
		return nil, err
	}
	src, err := b.req.Host.FS.Lookup(host)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, invalid("device %s does not exist on the node", host)
	}
	if err != nil {
		return nil, invalid("device %s: %w", host, err)
	}
	if slices.Contains(src.Flags, "nodev") {
		return nil, unsupported("device %s: it lies on a filesystem mounted nodev, where no device can be opened", host)
	}
	inside = filepath.Clean(inside)
	switch {
	case src.Mode&(fs.ModeDevice|fs.ModeNamedPipe) != 0:
		return b.deviceNode(src.Path, inside)
	case !src.Mode.IsDir():
		return nil, invalid("device %s is neither a device nor a directory of devices", host)
	}
	if src.Path != "/dev" && !strings.HasPrefix(src.Path, "/dev/") {
		// All below it is looked at, which of another place may be a whole disk.
		return nil, invalid("device %s: a directory of devices must be below /dev", host)
	}
	nodes, err := b.req.Host.FS.Devices(src.Path)
	if err != nil {
		return nil, err
	}
	if len(nodes) == 0 {
		return nil, invalid("device %s: the directory holds no device that this node's user can open", host)
	}
	var out []specs.Mount
	for _, n := range nodes {
		rel, err := filepath.Rel(src.Path, n)
		if err != nil {
			return nil, invalid("device %s: %w", n, err)
		}
		more, err := b.deviceNode(n, filepath.Join(inside, rel))
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	return out, nil
}

func (b *builder) deviceNode(host, inside string) ([]specs.Mount, error) {
	if slices.Contains(libcontainerDevices, inside) {
		if host != inside {
			return nil, unsupported("device %s at %s: the container's own device is there", host, inside)
		}
		return nil, nil // there already
	}
	return []specs.Mount{deviceMount(host, inside)}, nil
}

// devicePermissions: the device cgroup needs root, so nothing stands between a container and a node that it can
// see but the node's own mode. "m" is always withheld, as mknod(2) is.
func (b *builder) devicePermissions(d *runtimeapi.Device) error {
	p := d.GetPermissions()
	if strings.Trim(p, "rwm") != "" {
		return invalid("device %s: permissions %q are not of r, w and m", d.GetHostPath(), p)
	}
	if p != "" && (!strings.Contains(p, "r") || !strings.Contains(p, "w")) {
		return b.lack("device %s: permissions %q are not enforced: a rootless node has no device cgroup, the device's mode decides",
			d.GetHostPath(), p)
	}
	return nil
}
