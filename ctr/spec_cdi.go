package ctr

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	cdispecs "tags.cncf.io/container-device-interface/specs-go"
)

// cdi makes the edits that the specifications of the container's CDI devices ask for. They are the work of who
// administers the node, and outrank what the container says itself, as they do elsewhere. The library's own way of
// applying them is not used: it makes device nodes, where only binding them works, and takes mounts as they are.
func (b *builder) cdi() error {
	var names []string
	for _, d := range b.req.Container.GetCDIDevices() {
		if !slices.Contains(names, d.GetName()) {
			names = append(names, d.GetName())
		}
	}
	if len(names) == 0 {
		return nil
	}
	edits, err := b.req.Host.FS.CDIEdits(b.req.Host.CDISpecDirs, names)
	if err != nil {
		return err
	}
	if err := b.edit(edits); err != nil {
		return fmt.Errorf("CDI device %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}

func (b *builder) edit(e *cdispecs.ContainerEdits) error {
	switch {
	case len(e.NetDevices) > 0:
		return unsupported("network interface %s: those of the host are not this node's to move into a pod", e.NetDevices[0].HostInterfaceName)
	case e.IntelRdt != nil:
		return unsupported("intelRdt: resctrl belongs to the host's root")
	}
	if err := b.editEnvironment(e.Env); err != nil {
		return err
	}
	var groups []int64
	for _, g := range e.AdditionalGIDs {
		if g != 0 { // "unset", to the library
			groups = append(groups, int64(g))
		}
	}
	if err := b.addGroups(groups); err != nil {
		return err
	}
	var mounts []specs.Mount
	for _, d := range e.DeviceNodes {
		more, err := b.cdiDevice(d)
		if err != nil {
			return err
		}
		mounts = append(mounts, more...)
	}
	for _, m := range e.Mounts {
		mount, err := b.cdiMount(m)
		if err != nil {
			return err
		}
		mounts = append(mounts, mount)
	}
	b.spec.Mounts = dropCovered(append(b.spec.Mounts, mounts...))
	sortMounts(b.spec.Mounts)
	return b.cdiHooks(e.Hooks)
}

func (b *builder) editEnvironment(more []string) error {
	env := newEnvironment()
	for _, kv := range slices.Concat(b.spec.Process.Env, more) {
		key, value, found := strings.Cut(kv, "=")
		if !found || key == "" || strings.ContainsRune(kv, 0) {
			return invalid("environment: %q is not NAME=VALUE", kv)
		}
		env.set(key, value)
	}
	b.spec.Process.Env = env.list()
	return nil
}

// cdiDevice: a specification may say all of a node that is to be made; here it must be one that the node has.
func (b *builder) cdiDevice(d *cdispecs.DeviceNode) ([]specs.Mount, error) {
	device := &runtimeapi.Device{HostPath: d.HostPath, ContainerPath: d.Path, Permissions: d.Permissions}
	if device.HostPath == "" {
		device.HostPath = d.Path
	}
	if d.Permissions == cdi.NoPermissions {
		device.Permissions = ""
		if err := b.lack("device %s: that it has no permissions is not enforced: a rootless node has no device cgroup", device.HostPath); err != nil {
			return nil, err
		}
	}
	mounts, err := b.device(device)
	if err != nil {
		return nil, err
	}
	src, err := b.req.Host.FS.Lookup(device.HostPath)
	if err != nil {
		return nil, err
	}
	if kind := deviceKind(src.Mode); d.Type != "" && kind != strings.ReplaceAll(d.Type, "u", "c") {
		return nil, invalid("device %s is of type %q, the specification says %q", device.HostPath, kind, d.Type)
	}
	if d.UID != nil || d.GID != nil || d.FileMode != nil && d.FileMode.Perm() != src.Mode.Perm() {
		return mounts, b.lack("device %s: its owner and mode are not applied: it is the node's own, and keeps those", device.HostPath)
	}
	return mounts, nil
}

// deviceKind is the letter that mknod(1) has for it.
func deviceKind(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeCharDevice != 0:
		return "c"
	case mode&fs.ModeDevice != 0:
		return "b"
	case mode&fs.ModeNamedPipe != 0:
		return "p"
	}
	return ""
}

// cdiPropagation has the options that say how mounts travel.
var cdiPropagation = map[string]runtimeapi.MountPropagation{
	"private": runtimeapi.MountPropagation_PROPAGATION_PRIVATE, "rprivate": runtimeapi.MountPropagation_PROPAGATION_PRIVATE,
	"slave": runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, "rslave": runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
	"shared": runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL, "rshared": runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL,
}

// cdiMeansNothing are options that a bind mount has anyhow, or that would free a flag of its source, which stays. bind
// is taken as rbind: where what is mounted below is locked, the kernel refuses to leave it away.
var cdiMeansNothing = []string{"bind", "rbind", "rw", "defaults", "exec", "dev", "suid", "symfollow"}

// cdiMount makes a bind mount as if the container had asked for it: the source must exist, and keeps its locked flags.
func (b *builder) cdiMount(m *cdispecs.Mount) (specs.Mount, error) {
	switch m.Type {
	case "", "bind", "none":
	case "tmpfs":
		if !filepath.IsAbs(m.ContainerPath) || filepath.Clean(m.ContainerPath) == "/" {
			return specs.Mount{}, invalid("mount: containerPath %q is not an absolute path below /", m.ContainerPath)
		}
		return specs.Mount{Destination: filepath.Clean(m.ContainerPath), Type: "tmpfs", Source: "tmpfs", Options: m.Options}, nil
	default:
		return specs.Mount{}, unsupported("mount %s: type %s: a user namespace mounts bind and tmpfs", m.ContainerPath, m.Type)
	}
	asked := &runtimeapi.Mount{ContainerPath: m.ContainerPath, HostPath: m.HostPath}
	for _, o := range m.Options {
		propagation, travels := cdiPropagation[o]
		switch {
		case travels:
			asked.Propagation = propagation
		case !slices.Contains(cdiMeansNothing, o):
			asked.MountOptions = append(asked.MountOptions, o)
		}
	}
	return b.userMount(asked)
}

// The time that a hook may take, in seconds: what it gets where its specification says nothing, and at most; and what all
// of a container may take. While one runs the container's start waits, which is given up after two minutes.
const hookTimeout, maxHookTimeout, maxAllHooks = 30, 60, 90

// cdiHooks takes the hooks of a container's making. They are programs of the node, run by the keeper or by the
// container's init before its program; what runs after that would be a child of which nobody knows.
func (b *builder) cdiHooks(hooks []*cdispecs.Hook) error {
	if len(hooks) == 0 {
		return nil
	}
	if len(hooks) > maxAllHooks {
		return invalid("%d hooks: %d at most", len(hooks), maxAllHooks)
	}
	all := &specs.Hooks{}
	var timeouts []*int
	lists := map[string]*[]specs.Hook{
		cdi.PrestartHook:      &all.Prestart, //nolint:staticcheck // deprecated, and still what some vendors generate
		cdi.CreateRuntimeHook: &all.CreateRuntime, cdi.CreateContainerHook: &all.CreateContainer, cdi.StartContainerHook: &all.StartContainer,
	}
	for _, h := range hooks {
		list := lists[h.HookName]
		if list == nil {
			return unsupported("hook %s (%s): only hooks that run before the container's program are run here", h.HookName, h.Path)
		}
		hook, err := b.cdiHook(h)
		if err != nil {
			return err
		}
		*list = append(*list, hook)
		timeouts = append(timeouts, hook.Timeout)
	}
	shareHookTime(timeouts)
	b.spec.Hooks = all
	return nil
}

// shareHookTime shortens the time of each in proportion, to a second at least, where together they have too much.
func shareHookTime(timeouts []*int) {
	sum := 0
	for _, t := range timeouts {
		sum += *t
	}
	if sum <= maxAllHooks {
		return
	}
	for _, t := range timeouts {
		*t = 1 + (*t-1)*(maxAllHooks-len(timeouts))/(sum-len(timeouts))
	}
}

func (b *builder) cdiHook(h *cdispecs.Hook) (specs.Hook, error) {
	if !filepath.IsAbs(h.Path) {
		return specs.Hook{}, invalid("hook %s: path %q is not absolute", h.HookName, h.Path)
	}
	if h.HookName != cdi.StartContainerHook { // whose program is the container's
		if _, err := b.req.Host.FS.Lookup(h.Path); err != nil {
			return specs.Hook{}, invalid("hook %s: %w", h.HookName, err)
		}
	}
	hook := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env, Timeout: new(hookTimeout)}
	if h.Timeout != nil {
		if *h.Timeout < 1 {
			return specs.Hook{}, invalid("hook %s (%s): timeout %d is not positive", h.HookName, h.Path, *h.Timeout)
		}
		*hook.Timeout = min(*h.Timeout, maxHookTimeout)
	}
	if len(hook.Env) == 0 {
		hook.Env = []string{"PATH=" + defaultPath} // libcontainer would give it the keeper's
	}
	return hook, nil
}
