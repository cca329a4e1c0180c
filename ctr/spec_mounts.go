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

// mounts sets what is mounted, parents before children.
func (b *builder) mounts() error {
	taken := map[string]bool{}
	var asked []specs.Mount
	for _, m := range b.req.Container.GetMounts() {
		mount, err := b.userMount(m)
		if err != nil {
			return err
		}
		taken[mount.Destination] = true
		asked = append(asked, mount)
	}
	kernel, err := b.kernelMounts()
	if err != nil {
		return err
	}
	pod, err := b.podMounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Concat(kernel, pod) {
		if !covered(m.Destination, taken) {
			b.spec.Mounts = append(b.spec.Mounts, m)
		}
	}
	b.spec.Mounts = append(b.spec.Mounts, asked...)
	sortMounts(b.spec.Mounts)
	return nil
}

// covered: where the container mounts something itself, it means to have that. A /dev or /sys of its own (a DaemonSet
// that manages devices has the node's) is whole: what is put into ours would have to be made in that one.
func covered(destination string, taken map[string]bool) bool {
	return taken[destination] || taken["/dev"] && strings.HasPrefix(destination, "/dev/") ||
		taken["/sys"] && strings.HasPrefix(destination, "/sys/")
}

// sortMounts puts parents before what is mounted inside them, and keeps the order otherwise.
func sortMounts(mounts []specs.Mount) {
	depth := func(m specs.Mount) int { return strings.Count(filepath.Clean(m.Destination), "/") }
	slices.SortStableFunc(mounts, func(a, b specs.Mount) int { return depth(a) - depth(b) })
}

// kernelMounts are the filesystems that the kernel makes for each container.
func (b *builder) kernelMounts() ([]specs.Mount, error) {
	pts := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if b.req.Host.IDs.HasGID(ttyGroup) {
		pts = append(pts, "gid=5") // an unmapped gid is EINVAL
	}
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: pts},
	}
	sys, err := b.sysMount()
	if err != nil {
		return nil, err
	}
	mounts = append(mounts, sys)
	if b.hasCgroup() && b.req.Host.CgroupV2Mounted {
		mounts = append(mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
			Options: []string{"nosuid", "noexec", "nodev", "relatime", b.kernelMode()}})
	}
	if b.req.Namespaces.IPC != "" {
		return append(mounts, specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue",
			Options: []string{"nosuid", "noexec", "nodev"}}), nil
	}
	// The node's IPC namespace is not its user namespace's: mqueue cannot be mounted, only what is there be shown.
	if src, err := b.req.Host.FS.Lookup("/dev/mqueue"); err == nil {
		mounts = append(mounts, bind(src.Path, "/dev/mqueue"))
	}
	return mounts, nil
}

// ttyGroup is the group of terminals on every distribution.
const ttyGroup = 5

// kernelMode: "Any sysfs and procfs mounts are mounted RW" where privileged (CRI).
func (b *builder) kernelMode() string {
	if b.security.GetPrivileged() {
		return "rw"
	}
	return "ro"
}

// sysMount: sysfs shows a network namespace, and is mounted by whoever owns that. The host's own does not belong
// to the node's user namespace; there, its /sys is shown.
func (b *builder) sysMount() (specs.Mount, error) {
	if b.req.Namespaces.Net == "" {
		return b.flaggedBind("/sys", "/sys", []string{"ro", "rro", "nosuid", "noexec", "nodev"})
	}
	mode := b.kernelMode()
	if b.req.Host.SysReadonly && mode == "rw" {
		// The flag is locked, and the kernel refuses a new sysfs that would be freer (mount_namespaces(7)).
		mode = "ro"
		b.note("/sys is read-only in the privileged container, as it is on the node")
	}
	return specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs",
		Options: []string{"nosuid", "noexec", "nodev", mode}}, nil
}

// podMounts are the files that the containers of a pod share.
func (b *builder) podMounts() ([]specs.Mount, error) {
	var out []specs.Mount
	var extra []string
	if b.security.GetReadonlyRootfs() {
		extra = []string{"ro"}
	}
	files := b.req.Files
	for _, f := range []struct{ source, destination string }{
		{files.ResolvConf, "/etc/resolv.conf"}, {files.Hosts, "/etc/hosts"}, {files.Hostname, "/etc/hostname"},
	} {
		if f.source == "" {
			continue
		}
		m, err := b.flaggedBind(f.source, f.destination, extra)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	shm := files.Shm
	if shm == "" && b.req.Namespaces.HostIPC {
		shm = "/dev/shm"
	}
	if shm == "" {
		return append(out, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}), nil
	}
	m, err := b.flaggedBind(shm, "/dev/shm", []string{"nosuid", "noexec", "nodev"})
	return append(out, m), err
}

// bind mounts source with all under it, with the flags that it has.
func bind(source, destination string) specs.Mount {
	return specs.Mount{Destination: destination, Type: "bind", Source: source, Options: []string{"rbind", "rprivate"}}
}

// flaggedBind mounts source with extra flags, and keeps those that it has: see statFlags. Without extra flags
// nothing is remounted, and so nothing is lost.
func (b *builder) flaggedBind(source, destination string, extra []string) (specs.Mount, error) {
	m := bind(source, destination)
	if len(extra) == 0 {
		return m, nil
	}
	src, err := b.req.Host.FS.Lookup(source)
	if err != nil {
		return specs.Mount{}, invalid("mount %s: %w", destination, err)
	}
	m.Source, m.Options = src.Path, bindOptions(src, extra, "rprivate")
	return m, nil
}

func bindOptions(src Source, extra []string, propagation string) []string {
	out := []string{"rbind"}
	if len(extra) == 0 {
		return append(out, propagation)
	}
	isAtime := func(o string) bool { return slices.Contains(atimeOptions, o) }
	ownAtime := slices.ContainsFunc(extra, isAtime)
	out = append(out, extra...)
	for _, o := range src.Flags {
		if !slices.Contains(out, o) && !(ownAtime && isAtime(o)) {
			out = append(out, o)
		}
	}
	return append(out, propagation)
}

// userMount makes a mount that the container asked for.
func (b *builder) userMount(m *runtimeapi.Mount) (specs.Mount, error) {
	at := m.GetContainerPath()
	if !filepath.IsAbs(at) || filepath.Clean(at) == "/" {
		return specs.Mount{}, invalid("mount: container_path %q is not an absolute path below /", at)
	}
	if strings.ContainsRune(at, 0) || strings.ContainsRune(m.GetHostPath(), 0) {
		return specs.Mount{}, invalid("mount %q: a path contains a NUL byte", at)
	}
	if len(m.GetUidMappings())+len(m.GetGidMappings()) > 0 {
		return specs.Mount{}, unsupported("mount %s: uidMappings and gidMappings: the kernel maps no ids of the node's filesystems "+
			"inside a user namespace", at)
	}
	extra, err := mountOptions(m)
	if err != nil {
		return specs.Mount{}, err
	}
	src, err := b.mountSource(m)
	if err != nil {
		return specs.Mount{}, err
	}
	propagation, err := b.propagation(m, src)
	if err != nil {
		return specs.Mount{}, err
	}
	return specs.Mount{Destination: filepath.Clean(at), Type: "bind", Source: src.Path,
		Options: bindOptions(src, extra, propagation)}, nil
}

// mountSource finds what is mounted. "If the host path doesn't exist, then runtimes should report an error. If the
// hostpath is a symbolic link, runtimes should follow the symlink" (CRI).
func (b *builder) mountSource(m *runtimeapi.Mount) (Source, error) {
	at, path := m.GetContainerPath(), m.GetHostPath()
	if m.GetImage().GetImage() != "" {
		if path != "" {
			return Source{}, invalid("mount %s: host_path and image exclude each other", at)
		}
		if path = b.req.ImageMounts[at]; path == "" {
			return Source{}, invalid("mount %s: image %s is not mounted on the node", at, m.GetImage().GetImage())
		}
	}
	if !filepath.IsAbs(path) {
		return Source{}, invalid("mount %s: host_path %q is not absolute", at, path)
	}
	src, err := b.req.Host.FS.Lookup(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Source{}, invalid("mount %s: host_path %s does not exist; make it first (in a pod: hostPath.type DirectoryOrCreate)", at, path)
	}
	if err != nil {
		return Source{}, invalid("mount %s: %w", at, err)
	}
	return src, nil
}

// restricting are the mount options that take something away from a bind mount. Those that give something back
// (exec, dev, suid, rw) are not the container's to ask: where they change anything, the flag may be locked.
var restricting = []string{
	"noexec", "nodev", "nosuid", "nosymfollow", "ro", "noatime", "nodiratime", "relatime", "strictatime",
	"rnoexec", "rnodev", "rnosuid", "rnosymfollow", "rro",
}

// mountOptions returns the flags that m adds to those of its source.
func mountOptions(m *runtimeapi.Mount) ([]string, error) {
	at := m.GetContainerPath()
	image := m.GetImage().GetImage() != ""
	var out []string
	switch {
	case m.GetRecursiveReadOnly() && !m.GetReadonly():
		return nil, invalid("mount %s: recursive_read_only needs readonly", at)
	case m.GetRecursiveReadOnly() && m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
		return nil, invalid("mount %s: recursive_read_only needs propagation PRIVATE", at)
	case m.GetRecursiveReadOnly() || image: // "All image mounts are per feature definition readonly" (CRI)
		out = []string{"ro", "rro"}
	case m.GetReadonly():
		out = []string{"ro"}
	}
	for _, o := range m.GetMountOptions() {
		if !slices.Contains(restricting, o) {
			return nil, invalid("mount %s: mount option %q: options of a bind mount are %s", at, o, strings.Join(restricting, ", "))
		}
		if !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out, nil
}

// propagation checks the mount under src: on a private one nothing propagates, and the kernel raises no error.
// The root filesystem's own propagation must not be less than that of its mounts, or libcontainer cuts the tie.
func (b *builder) propagation(m *runtimeapi.Mount, src Source) (string, error) {
	if m.GetPropagation() == runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		return "rprivate", nil
	}
	p, err := b.req.Host.FS.Propagation(src.Path)
	if err != nil {
		return "", invalid("mount %s: %w", m.GetContainerPath(), err)
	}
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if !p.Shared && !p.Slave {
			return "", unsupported("mount %s: propagation HOST_TO_CONTAINER: %s is neither on a shared nor on a slave mount of the node",
				m.GetContainerPath(), src.Path)
		}
		if b.spec.Linux.RootfsPropagation == "" {
			b.spec.Linux.RootfsPropagation = "rslave"
		}
		return "rslave", nil
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if !p.Shared {
			return "", unsupported("mount %s: propagation BIDIRECTIONAL: %s is not on a shared mount of the node",
				m.GetContainerPath(), src.Path)
		}
		b.spec.Linux.RootfsPropagation = "rshared"
		return "rshared", nil
	}
	return "", invalid("mount %s: propagation %d is unknown", m.GetContainerPath(), m.GetPropagation())
}
