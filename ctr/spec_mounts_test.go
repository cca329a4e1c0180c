package ctr

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	private       = runtimeapi.MountPropagation_PROPAGATION_PRIVATE
	hostToGuest   = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	bidirectional = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
)

func mountFS() *fakeFS {
	return &fakeFS{
		files: map[string][]byte{"/vol/file": nil, "/pod/resolv.conf": nil, "/pod/hosts": nil, "/pod/hostname": nil},
		dirs:  map[string]bool{"/vol/dir": true, "/vol/locked": true, "/img/vol": true, "/pod/shm": true, "/sys": true, "/dev/shm": true, "/dev/mqueue": true},
		links: map[string]string{"/vol/link": "/vol/dir"},
		flags: map[string][]string{"/vol/locked": {"nosuid", "nodev", "noexec", "relatime"}, "/pod/hosts": {"nosuid", "nodev", "relatime"}},
		propagation: map[string]Propagation{
			"/vol/dir": {Shared: true}, "/vol/file": {Slave: true},
		},
	}
}

func mounting(mounts ...*runtimeapi.Mount) func(*SpecRequest) {
	return func(r *SpecRequest) { r.Host.FS, r.Container.Mounts = mountFS(), mounts }
}

func TestMountOptionsAndSources(t *testing.T) {
	image := &runtimeapi.ImageSpec{Image: "sha256:1"}
	for _, c := range []struct {
		name   string
		mount  *runtimeapi.Mount
		source string
		want   []string
	}{
		{"read-write", &runtimeapi.Mount{HostPath: "/vol/dir"}, "/vol/dir", []string{"rbind", "rprivate"}},
		{"a file", &runtimeapi.Mount{HostPath: "/vol/file"}, "/vol/file", []string{"rbind", "rprivate"}},
		{"a symbolic link", &runtimeapi.Mount{HostPath: "/vol/link"}, "/vol/dir", []string{"rbind", "rprivate"}},
		{"locked flags, nothing to change", &runtimeapi.Mount{HostPath: "/vol/locked"}, "/vol/locked", []string{"rbind", "rprivate"}},
		{"read-only", &runtimeapi.Mount{HostPath: "/vol/dir", Readonly: true}, "/vol/dir", []string{"rbind", "ro", "relatime", "rprivate"}},
		{
			"read-only keeps locked flags", &runtimeapi.Mount{HostPath: "/vol/locked", Readonly: true}, "/vol/locked",
			[]string{"rbind", "ro", "nosuid", "nodev", "noexec", "relatime", "rprivate"},
		},
		{
			"recursively read-only", &runtimeapi.Mount{HostPath: "/vol/dir", Readonly: true, RecursiveReadOnly: true}, "/vol/dir",
			[]string{"rbind", "ro", "rro", "relatime", "rprivate"},
		},
		{
			"mount options", &runtimeapi.Mount{HostPath: "/vol/dir", MountOptions: []string{"noexec", "nosuid"}}, "/vol/dir",
			[]string{"rbind", "noexec", "nosuid", "relatime", "rprivate"},
		},
		{
			"an atime option replaces the source's", &runtimeapi.Mount{HostPath: "/vol/dir", MountOptions: []string{"noatime"}}, "/vol/dir",
			[]string{"rbind", "noatime", "rprivate"},
		},
		{"from host", &runtimeapi.Mount{HostPath: "/vol/dir", Propagation: hostToGuest}, "/vol/dir", []string{"rbind", "rslave"}},
		{"from a slave", &runtimeapi.Mount{HostPath: "/vol/file", Propagation: hostToGuest}, "/vol/file", []string{"rbind", "rslave"}},
		{"both ways", &runtimeapi.Mount{HostPath: "/vol/dir", Propagation: bidirectional}, "/vol/dir", []string{"rbind", "rshared"}},
		{"image volume", &runtimeapi.Mount{Image: image}, "/img/vol", []string{"rbind", "ro", "rro", "relatime", "rprivate"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.mount.ContainerPath = "/data/../data/x"
			spec, _ := build(t, mounting(c.mount), func(r *SpecRequest) { r.ImageMounts = map[string]string{"/data/../data/x": "/img/vol"} })
			m := mountAt(spec, "/data/x")
			if m == nil || m.Type != "bind" || m.Source != c.source {
				t.Fatalf("mount %+v, want a bind of %s", m, c.source)
			}
			equal(t, "options", m.Options, c.want)
		})
	}
}

func TestMountsRefused(t *testing.T) {
	mapping := []*runtimeapi.IDMapping{{Length: 1}}
	for _, c := range []struct {
		name  string
		class error
		word  string
		mount *runtimeapi.Mount
	}{
		{"missing source", ErrInvalid, "/vol/none does not exist", &runtimeapi.Mount{HostPath: "/vol/none"}},
		{"relative source", ErrInvalid, "absolute", &runtimeapi.Mount{HostPath: "vol"}},
		{"no source", ErrInvalid, "absolute", &runtimeapi.Mount{}},
		{"image and path", ErrInvalid, "exclude", &runtimeapi.Mount{HostPath: "/vol/dir", Image: &runtimeapi.ImageSpec{Image: "i"}}},
		{"image not there", ErrInvalid, "image i", &runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: "i"}}},
		{"rro without readonly", ErrInvalid, "readonly", &runtimeapi.Mount{HostPath: "/vol/dir", RecursiveReadOnly: true}},
		{"rro with propagation", ErrInvalid, "PRIVATE", &runtimeapi.Mount{HostPath: "/vol/dir", Readonly: true, RecursiveReadOnly: true, Propagation: hostToGuest}},
		{"uid mappings", ErrUnsupported, "uidMappings", &runtimeapi.Mount{HostPath: "/vol/dir", UidMappings: mapping}},
		{"gid mappings", ErrUnsupported, "gidMappings", &runtimeapi.Mount{HostPath: "/vol/dir", GidMappings: mapping}},
		{"option that frees", ErrInvalid, `"exec"`, &runtimeapi.Mount{HostPath: "/vol/dir", MountOptions: []string{"exec"}}},
		{"option of a filesystem", ErrInvalid, "size=1", &runtimeapi.Mount{HostPath: "/vol/dir", MountOptions: []string{"size=1"}}},
		{"private source, from host", ErrUnsupported, "slave", &runtimeapi.Mount{HostPath: "/vol/locked", Propagation: hostToGuest}},
		{"slave source, both ways", ErrUnsupported, "shared", &runtimeapi.Mount{HostPath: "/vol/file", Propagation: bidirectional}},
		{"unknown propagation", ErrInvalid, "9", &runtimeapi.Mount{HostPath: "/vol/dir", Propagation: 9}},
		{"NUL", ErrInvalid, "NUL", &runtimeapi.Mount{HostPath: "/vol/dir\x00"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.mount.ContainerPath = "/x"
			refused(t, c.class, []string{c.word, "/x"}, mounting(c.mount))
		})
	}
	for _, at := range []string{"", "x", "/", "/a/.."} {
		refused(t, ErrInvalid, []string{"container_path"}, mounting(&runtimeapi.Mount{HostPath: "/vol/dir", ContainerPath: at}))
	}
}

func TestRootfsPropagationIsThatOfTheStrongestMount(t *testing.T) {
	at := func(path string, p runtimeapi.MountPropagation) *runtimeapi.Mount {
		return &runtimeapi.Mount{HostPath: "/vol/dir", ContainerPath: path, Propagation: p}
	}
	for _, c := range []struct {
		want   string
		mounts []*runtimeapi.Mount
	}{
		{"", []*runtimeapi.Mount{at("/a", private)}},
		{"rslave", []*runtimeapi.Mount{at("/a", private), at("/b", hostToGuest)}},
		{"rshared", []*runtimeapi.Mount{at("/a", bidirectional), at("/b", hostToGuest)}},
		{"rshared", []*runtimeapi.Mount{at("/a", hostToGuest), at("/b", bidirectional)}},
	} {
		if spec, _ := build(t, mounting(c.mounts...)); spec.Linux.RootfsPropagation != c.want {
			t.Errorf("%v: %q, want %q", c.mounts, spec.Linux.RootfsPropagation, c.want)
		}
	}
}

func TestParentsAreMountedBeforeWhatIsInside(t *testing.T) {
	at := func(path string) *runtimeapi.Mount {
		return &runtimeapi.Mount{HostPath: "/vol/dir", ContainerPath: path}
	}
	spec, _ := build(t, mounting(at("/a/b/c"), at("/dev/shm/x"), at("/a"), at("/a/b"), at("/z/")))
	seen := map[string]int{}
	for i, m := range spec.Mounts {
		seen[m.Destination] = i
	}
	for child := range seen {
		for parent := filepath.Dir(child); parent != "/"; parent = filepath.Dir(parent) {
			if i, ok := seen[parent]; ok && i > seen[child] {
				t.Errorf("%s is mounted before %s", child, parent)
			}
		}
	}
	if _, ok := seen["/z"]; !ok || len(seen) != len(spec.Mounts) {
		t.Errorf("mounts %v", spec.Mounts)
	}
}

// TestADevOfTheContainersOwnIsWhole: nothing of ours is put into it, as nothing could be made there.
func TestADevOfTheContainersOwnIsWhole(t *testing.T) {
	fs := mountFS()
	fs.dirs["/dev"], fs.devs = true, map[string]bool{"/dev/fuse": true}
	spec, _ := build(t, func(r *SpecRequest) {
		r.Host.FS, r.Files = fs, PodFiles{Shm: "/pod/shm"}
		r.Host.CgroupUsable, r.Host.CgroupV2Mounted, r.CgroupsPath = true, true, "/pods/p/c"
		r.Container.Mounts = []*runtimeapi.Mount{
			{HostPath: "/dev", ContainerPath: "/dev/"}, {HostPath: "/sys", ContainerPath: "/sys"}, {HostPath: "/vol/file", ContainerPath: "/dev/extra"},
		}
	}, security(func(s *securityContext) { s.Privileged = true }))
	for _, m := range spec.Mounts {
		if strings.HasPrefix(m.Destination, "/dev/") && m.Destination != "/dev/extra" || strings.HasPrefix(m.Destination, "/sys/") {
			t.Errorf("%s is mounted over the container's own: %+v", m.Destination, m)
		}
	}
	if dev := mountAt(spec, "/dev"); dev == nil || dev.Type != "bind" || mountAt(spec, "/dev/extra") == nil || mountAt(spec, "/proc") == nil {
		t.Errorf("mounts %+v", spec.Mounts)
	}
}

func TestPodFiles(t *testing.T) {
	files := func(r *SpecRequest) {
		r.Files = PodFiles{ResolvConf: "/pod/resolv.conf", Hosts: "/pod/hosts", Hostname: "/pod/hostname", Shm: "/pod/shm"}
	}
	spec, _ := build(t, mounting(&runtimeapi.Mount{HostPath: "/vol/file", ContainerPath: "/etc/hosts"}), files)
	for at, source := range map[string]string{
		"/etc/resolv.conf": "/pod/resolv.conf", "/etc/hostname": "/pod/hostname", "/dev/shm": "/pod/shm", "/etc/hosts": "/vol/file",
	} {
		if m := mountAt(spec, at); m == nil || m.Source != source {
			t.Errorf("%s: %+v, want %s", at, m, source)
		}
	}
	equal(t, "/etc/resolv.conf", mountAt(spec, "/etc/resolv.conf").Options, []string{"rbind", "rprivate"})
	equal(t, "/dev/shm", mountAt(spec, "/dev/shm").Options, []string{"rbind", "nosuid", "noexec", "nodev", "relatime", "rprivate"})

	spec, _ = build(t, mounting(), files, security(func(s *securityContext) { s.ReadonlyRootfs = true }))
	equal(t, "/etc/hosts, read-only", mountAt(spec, "/etc/hosts").Options, []string{"rbind", "ro", "nosuid", "nodev", "relatime", "rprivate"})

	spec, _ = build(t)
	if m := mountAt(spec, "/etc/hosts"); m != nil {
		t.Errorf("/etc/hosts is mounted: %+v", m)
	}
	if m := mountAt(spec, "/dev/shm"); m == nil || m.Type != "tmpfs" {
		t.Errorf("/dev/shm: %+v, want a tmpfs", m)
	}
}

func TestKernelFilesystems(t *testing.T) {
	cgroup := func(r *SpecRequest) {
		r.Host.CgroupUsable, r.Host.CgroupV2Mounted, r.CgroupsPath = true, true, "/pods/podp1/c1"
	}
	hasCgroupNS := func(s *specs.Spec) bool {
		return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace && n.Path == "" })
	}
	spec, _ := build(t)
	for at, kind := range map[string]string{"/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/mqueue": "mqueue", "/sys": "sysfs"} {
		if m := mountAt(spec, at); m == nil || m.Type != kind {
			t.Errorf("%s: %+v, want %s", at, m, kind)
		}
	}
	if !slices.Contains(mountAt(spec, "/sys").Options, "ro") || !slices.Contains(mountAt(spec, "/dev/pts").Options, "gid=5") {
		t.Errorf("/sys %q, /dev/pts %q", mountAt(spec, "/sys").Options, mountAt(spec, "/dev/pts").Options)
	}
	if mountAt(spec, "/sys/fs/cgroup") != nil || hasCgroupNS(spec) || spec.Linux.CgroupsPath != "" {
		t.Error("a cgroup on a node that has none")
	}
	spec, _ = build(t, func(r *SpecRequest) { r.CgroupsPath = "/pods/x" })
	if spec.Linux.CgroupsPath != "" {
		t.Error("a cgroup path on a node that cannot use it")
	}
	spec, _ = build(t, cgroup)
	if m := mountAt(spec, "/sys/fs/cgroup"); m == nil || !slices.Contains(m.Options, "ro") || !hasCgroupNS(spec) || spec.Linux.CgroupsPath != "/pods/podp1/c1" {
		t.Errorf("cgroup %+v, path %q, namespaces %v", m, spec.Linux.CgroupsPath, spec.Linux.Namespaces)
	}
	spec, _ = build(t, cgroup, security(func(s *securityContext) { s.Privileged = true }))
	if m := mountAt(spec, "/sys/fs/cgroup"); !slices.Contains(m.Options, "rw") {
		t.Errorf("cgroup of a privileged container: %q", m.Options)
	}
	spec, _ = build(t, cgroup, func(r *SpecRequest) { r.Host.CgroupV2Mounted = false })
	if mountAt(spec, "/sys/fs/cgroup") != nil || !hasCgroupNS(spec) {
		t.Error("without a cgroup2 mount there is a namespace and no mount")
	}
}

func TestNamespaces(t *testing.T) {
	pid := func(mode runtimeapi.NamespaceMode, ns Namespaces) func(*SpecRequest) {
		return func(r *SpecRequest) {
			r.Host.FS = mountFS()
			r.Namespaces = ns
			r.Container.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: mode, TargetId: "c0"}
		}
	}
	joined := Namespaces{Net: "/n", IPC: "/i", UTS: "/u"}
	with := func(change func(*Namespaces)) Namespaces { n := joined; change(&n); return n }
	for _, c := range []struct {
		name   string
		change func(*SpecRequest)
		want   string
	}{
		{"container", pid(runtimeapi.NamespaceMode_CONTAINER, joined), "mount network=/n ipc=/i uts=/u pid"},
		{"pod", pid(runtimeapi.NamespaceMode_POD, with(func(n *Namespaces) { n.PID = "/p" })), "mount network=/n ipc=/i uts=/u pid=/p"},
		{"target", pid(runtimeapi.NamespaceMode_TARGET, with(func(n *Namespaces) { n.PID = "/t" })), "mount network=/n ipc=/i uts=/u pid=/t"},
		{"node pid", pid(runtimeapi.NamespaceMode_NODE, with(func(n *Namespaces) { n.HostPID = true })), "mount network=/n ipc=/i uts=/u"},
		{"node network joined by path", pid(runtimeapi.NamespaceMode_CONTAINER, with(func(n *Namespaces) { n.HostNet = true })), "mount network=/n ipc=/i uts=/u pid"},
		{"all of the node", pid(runtimeapi.NamespaceMode_NODE, Namespaces{HostNet: true, HostIPC: true, HostUTS: true, HostPID: true}), "mount"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, c.change)
			var got []string
			for _, n := range spec.Linux.Namespaces {
				got = append(got, strings.TrimSuffix(string(n.Type)+"="+n.Path, "="))
			}
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
			if spec.Hostname != "" || len(spec.Linux.Sysctl) != 0 || len(spec.Linux.UIDMappings) != 0 {
				t.Error("hostname, sysctls and id maps are the pod's")
			}
		})
	}
	spec, _ := build(t, pid(runtimeapi.NamespaceMode_NODE, Namespaces{HostNet: true, HostIPC: true, HostUTS: true, HostPID: true}))
	for at, source := range map[string]string{"/sys": "/sys", "/dev/shm": "/dev/shm", "/dev/mqueue": "/dev/mqueue"} {
		if m := mountAt(spec, at); m == nil || m.Type != "bind" || m.Source != source {
			t.Errorf("%s: %+v, want the node's", at, m)
		}
	}
	refused(t, ErrInvalid, []string{"pid", "POD"}, pid(runtimeapi.NamespaceMode_POD, joined))
	refused(t, ErrInvalid, []string{"network"}, pid(runtimeapi.NamespaceMode_CONTAINER, Namespaces{IPC: "/i", UTS: "/u"}))
	userns := func(u *runtimeapi.UserNamespace) func(*SpecRequest) {
		return security(func(s *securityContext) { s.NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: u} })
	}
	build(t, userns(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}))
	refused(t, ErrInvalid, []string{"CONTAINER"}, userns(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_CONTAINER}))
	refused(t, ErrInvalid, []string{"TARGET"}, userns(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_TARGET}))
	refused(t, ErrUnsupported, []string{"user namespace"}, userns(&runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{Length: 65536}}}))
}
