package ctr

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SpecRequest is all that a container's spec depends on.
type SpecRequest struct {
	ID          string
	Pod         *runtimeapi.PodSandboxConfig
	Container   *runtimeapi.ContainerConfig
	Image       ImageConfig
	Rootfs      string // absolute path of the mounted root filesystem
	Namespaces  Namespaces
	Files       PodFiles
	CgroupsPath string            // relative to the root of the node's cgroup2 tree; "" = none
	ImageMounts map[string]string // container_path → directory of an image volume, sub path applied
	Users       Users             // reads the root filesystem's passwd and group
	Rlimits     map[string]Limit  // what the node's configuration gives each container; clamped to the Host's
	Host        Host
}

// ImageConfig is the part of an image's configuration that a spec depends on.
type ImageConfig struct {
	Entrypoint, Cmd, Env         []string
	WorkingDir, User, StopSignal string
}

// Namespaces says which namespaces a container joins. A path is joined. Without a path the container has a new
// namespace (pid only: the others belong to the pod), or, where the flag says so, stays in the node's.
type Namespaces struct {
	Net, IPC, UTS, PID                 string
	HostNet, HostIPC, HostUTS, HostPID bool
}

// PodFiles are the files of the pod that each of its containers sees, unless it mounts something there itself.
// "" = none.
type PodFiles struct{ ResolvConf, Hosts, Hostname, Shm string }

// BuildSpec makes the OCI runtime spec of a container: a pure function of the request, and of the node's files as
// Host.FS shows them. The sentences say what was asked for and is not applied, under the policy "best-effort".
// Errors wrap ErrInvalid or ErrUnsupported.
func BuildSpec(req SpecRequest) (*specs.Spec, []string, error) {
	b := newBuilder(req)
	for _, step := range []func() error{
		b.rootfs,
		b.namespaces,
		b.process,
		b.user,
		b.capabilities,
		b.privileges,
		b.paths,
		b.mounts,
		b.devices,
		b.cdi, // after what it outranks
		b.resources,
		b.rlimits,
		b.seccomp, // last: its rules depend on the capabilities
	} {
		if err := step(); err != nil {
			return nil, nil, err
		}
	}
	return b.spec, b.sentences, nil
}

// builder carries a spec through its steps.
type builder struct {
	req       SpecRequest
	security  *runtimeapi.LinuxContainerSecurityContext // never nil
	spec      *specs.Spec
	sentences []string
}

func newBuilder(req SpecRequest) *builder {
	b := &builder{req: req, security: req.Container.GetLinux().GetSecurityContext()}
	if b.security == nil {
		b.security = &runtimeapi.LinuxContainerSecurityContext{}
	}
	b.spec = &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{},
		Linux:   &specs.Linux{},
	}
	return b
}

func (b *builder) rootfs() (err error) {
	b.spec.Root, err = rootOf(b.req.Rootfs, b.security.GetReadonlyRootfs(), b.req.Host.FS)
	return err
}

// rootOf names the root filesystem without symbolic links: libcontainer refuses others, and a home directory often
// lies behind one.
func rootOf(path string, readonly bool, node NodeFS) (*specs.Root, error) {
	src, err := node.Lookup(path)
	if err != nil {
		return nil, fmt.Errorf("find root filesystem: %w", err)
	}
	return &specs.Root{Path: src.Path, Readonly: readonly}, nil
}

// note adds a sentence on something that the CRI lets a runtime adapt.
func (b *builder) note(format string, args ...any) {
	b.sentences = append(b.sentences, fmt.Sprintf(format, args...))
}

// lack deals with what the node cannot give, by its policy: a sentence, or an error.
func (b *builder) lack(format string, args ...any) error {
	if b.req.Host.Strict {
		return fmt.Errorf("%w (policy strict): "+format, append([]any{ErrUnsupported}, args...)...)
	}
	b.note(format, args...)
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...)
}

// namespaces lists the namespaces to make and to join. None is a user namespace: the container lives in the
// node's, and the kernel maps no ids of ext4 or overlay mounts for a nested one.
func (b *builder) namespaces() error {
	ns := b.req.Namespaces
	opts := b.security.GetNamespaceOptions()
	if err := checkUserns(opts.GetUsernsOptions()); err != nil {
		return err
	}
	if mode := opts.GetPid(); (mode == runtimeapi.NamespaceMode_POD || mode == runtimeapi.NamespaceMode_TARGET) &&
		ns.PID == "" && !ns.HostPID {
		return invalid("pid namespace mode %s: there is no pid namespace to join", mode)
	}
	list, err := namespaceList(ns)
	if err != nil {
		return err
	}
	b.spec.Linux.Namespaces = list
	if b.hasCgroup() {
		// The container's cgroup becomes the root of its view: it neither sees nor reaches the node's.
		b.spec.Linux.Namespaces = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
		b.spec.Linux.CgroupsPath = b.req.CgroupsPath
	}
	return nil
}

// hasCgroup: without a usable tree libcontainer fails on any cgroup path (mkdir EACCES), so none is given.
func (b *builder) hasCgroup() bool { return b.req.Host.CgroupUsable && b.req.CgroupsPath != "" }

func checkUserns(u *runtimeapi.UserNamespace) error {
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_TARGET:
		return invalid("user namespace mode %s: only POD and NODE exist", u.GetMode())
	case runtimeapi.NamespaceMode_POD:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return unsupported("user namespace of the pod: ids of the node's filesystems cannot be mapped inside a user namespace; " +
				"containers run in the node's own, in which root is an ordinary user already")
		}
	}
	return nil
}

func namespaceList(ns Namespaces) ([]specs.LinuxNamespace, error) {
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	for _, n := range []struct {
		kind specs.LinuxNamespaceType
		path string
		host bool
	}{
		{specs.NetworkNamespace, ns.Net, ns.HostNet},
		{specs.IPCNamespace, ns.IPC, ns.HostIPC},
		{specs.UTSNamespace, ns.UTS, ns.HostUTS},
	} {
		switch {
		case n.path != "":
			list = append(list, specs.LinuxNamespace{Type: n.kind, Path: n.path})
		case !n.host:
			return nil, invalid("%s namespace: the pod gave none to join", n.kind)
		}
	}
	if !ns.HostPID {
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: ns.PID})
	}
	return list, nil
}

// paths sets what of /proc and /sys is hidden or read-only.
func (b *builder) paths() error {
	if b.security.GetPrivileged() {
		// "Sensitive paths, such as kernel module paths within sysfs, are not masked" (CRI).
		return nil
	}
	masked, readonly := b.security.GetMaskedPaths(), b.security.GetReadonlyPaths()
	if len(masked)+len(readonly) == 0 {
		// Two empty lists are an absent one in proto3, and mean what the kubelet always sends: crictl, which sends none, is
		// not to show its containers more. The kubelet itself sends empty ones for procMount Unmasked alone, which
		// Kubernetes grants with hostUsers: false only; such a pod is refused before it comes to this.
		masked, readonly = defaultMaskedPaths, defaultReadonlyPaths
	}
	for _, p := range slices.Concat(masked, readonly) {
		if !filepath.IsAbs(p) {
			return invalid("masked or read-only path %q is not absolute", p)
		}
	}
	b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = slices.Clone(masked), slices.Clone(readonly)
	return nil
}

// The lists of the kubelet and of the engines of this field: what of the kernel is not the container's.
var (
	defaultMaskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
	defaultReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)
