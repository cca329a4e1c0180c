package ctr

import (
	"errors"
	"io/fs"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type securityContext = runtimeapi.LinuxContainerSecurityContext

func without(list []string, drop ...string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(drop, s) })
}

func TestCapabilities(t *testing.T) {
	all := slices.Clone(allCapabilities)
	slices.Sort(all)
	type caps = runtimeapi.Capability
	for _, c := range []struct {
		name          string
		caps          *caps
		want, ambient []string
	}{
		{"default", nil, defaultCapabilities, nil},
		{"add with and without prefix, in any case", &caps{AddCapabilities: []string{"NET_ADMIN", "CAP_SYS_TIME", "cap_bpf"}},
			append([]string{"CAP_AUDIT_WRITE", "CAP_BPF"}, append(defaultCapabilities[1:7:7],
				"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
				"CAP_SYS_CHROOT", "CAP_SYS_TIME")...), nil},
		{"drop", &caps{DropCapabilities: []string{"chown", "CAP_NET_RAW", "SYS_ADMIN"}}, without(defaultCapabilities, "CAP_CHOWN", "CAP_NET_RAW"), nil},
		{"add ALL", &caps{AddCapabilities: []string{"ALL"}}, all, nil},
		{"drop ALL", &caps{DropCapabilities: []string{"all"}}, []string{}, nil},
		{"drop ALL, add one", &caps{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}, []string{"CAP_CHOWN"}, nil},
		{"add ALL, drop one", &caps{DropCapabilities: []string{"CHOWN"}, AddCapabilities: []string{"ALL"}}, without(all, "CAP_CHOWN"), nil},
		{"add and drop one", &caps{DropCapabilities: []string{"BPF"}, AddCapabilities: []string{"BPF"}}, defaultCapabilities, nil},
		{"drop ALL, add ALL", &caps{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"ALL"}}, []string{}, nil},
		{"ambient", &caps{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}},
			[]string{"CAP_NET_BIND_SERVICE"}, []string{"CAP_NET_BIND_SERVICE"}},
		{"ambient and dropped", &caps{DropCapabilities: []string{"BPF"}, AddAmbientCapabilities: []string{"BPF"}}, defaultCapabilities, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, security(func(s *securityContext) { s.Capabilities = c.caps }))
			got := spec.Process.Capabilities
			equal(t, "bounding", got.Bounding, c.want)
			equal(t, "effective", got.Effective, c.want)
			equal(t, "permitted", got.Permitted, c.want)
			equal(t, "inheritable", got.Inheritable, c.ambient)
			equal(t, "ambient", got.Ambient, c.ambient)
		})
	}
	for _, bad := range []*caps{{AddCapabilities: []string{"FLY"}}, {DropCapabilities: []string{"FLY"}}, {AddAmbientCapabilities: []string{"FLY"}}} {
		refused(t, ErrInvalid, []string{"FLY"}, security(func(s *securityContext) { s.Capabilities = bad }))
	}
}

func TestPrivileged(t *testing.T) {
	fakes := &fakeFS{devs: map[string]bool{"/dev/null": true, "/dev/fuse": true, "/dev/net/tun": true}}
	spec, sentences := build(t, func(r *SpecRequest) { r.Host.FS = fakes }, security(func(s *securityContext) {
		s.Privileged = true
		s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		s.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "t"}
		s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
	}))
	if len(sentences) != 0 {
		t.Errorf("sentences %q", sentences)
	}
	if n := len(spec.Process.Capabilities.Effective); n != len(allCapabilities) {
		t.Errorf("%d capabilities, want all %d", n, len(allCapabilities))
	}
	if spec.Linux.Seccomp != nil || spec.Process.ApparmorProfile != "" || len(spec.Linux.MaskedPaths)+len(spec.Linux.ReadonlyPaths) != 0 {
		t.Errorf("a privileged container is confined: %+v", spec.Linux)
	}
	if sys := mountAt(spec, "/sys"); !slices.Contains(sys.Options, "rw") {
		t.Errorf("/sys is mounted %q, want rw", sys.Options)
	}
	for path, want := range map[string]bool{"/dev/fuse": true, "/dev/net/tun": true, "/dev/null": false} {
		if got := mountAt(spec, path) != nil; got != want {
			t.Errorf("%s mounted: %v, want %v", path, got, want)
		}
	}
	spec, sentences = build(t, func(r *SpecRequest) { r.Host.SysReadonly = true }, security(func(s *securityContext) { s.Privileged = true }))
	if sys := mountAt(spec, "/sys"); !slices.Contains(sys.Options, "ro") || len(sentences) != 1 {
		t.Errorf("/sys is mounted %q with sentences %q, want ro and a sentence", sys.Options, sentences)
	}
}

func TestMaskedAndReadonlyPaths(t *testing.T) {
	spec, _ := build(t)
	equal(t, "masked by default", spec.Linux.MaskedPaths, defaultMaskedPaths)
	equal(t, "read-only by default", spec.Linux.ReadonlyPaths, defaultReadonlyPaths)
	spec, _ = build(t, func(r *SpecRequest) { r.Container.Linux = nil })
	equal(t, "masked without a security context", spec.Linux.MaskedPaths, defaultMaskedPaths)
	spec, _ = build(t, security(func(s *securityContext) { s.MaskedPaths, s.ReadonlyPaths = []string{}, []string{} }))
	equal(t, "masked by two empty lists", spec.Linux.MaskedPaths, defaultMaskedPaths)
	equal(t, "read-only by two empty lists", spec.Linux.ReadonlyPaths, defaultReadonlyPaths)
	spec, _ = build(t, security(func(s *securityContext) { s.ReadonlyPaths = []string{"/proc/sys"} }))
	equal(t, "masked, where only read-only ones are named", spec.Linux.MaskedPaths, nil)
	spec, _ = build(t, security(func(s *securityContext) { s.MaskedPaths = []string{"/bin/ls"} }))
	equal(t, "masked as asked", spec.Linux.MaskedPaths, []string{"/bin/ls"})
	equal(t, "read-only as asked", spec.Linux.ReadonlyPaths, nil)
	refused(t, ErrInvalid, []string{"proc/kcore"}, security(func(s *securityContext) { s.ReadonlyPaths = []string{"proc/kcore"} }))
}

func TestReadonlyRootfsAndNoNewPrivs(t *testing.T) {
	for _, on := range []bool{false, true} {
		spec, _ := build(t, security(func(s *securityContext) { s.ReadonlyRootfs, s.NoNewPrivs = on, on }))
		if spec.Root.Readonly != on || spec.Process.NoNewPrivileges != on {
			t.Errorf("asked %v: read-only %v, no_new_privs %v", on, spec.Root.Readonly, spec.Process.NoNewPrivileges)
		}
	}
}

func TestRootfsIsNamedWithoutSymbolicLinks(t *testing.T) {
	link := func(r *SpecRequest) {
		r.Rootfs, r.Host.FS = "/home/me/rootfs", &fakeFS{links: map[string]string{"/home/me/rootfs": testRootfs}}
	}
	if spec, _ := build(t, link); spec.Root.Path != testRootfs {
		t.Errorf("rootfs %q, want %q", spec.Root.Path, testRootfs)
	}
	if _, _, err := BuildSpec(request(func(r *SpecRequest) { r.Rootfs = "/none" })); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing rootfs: %v", err)
	}
}

const testProfile = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["sethostname"],"action":"SCMP_ACT_ERRNO"},
	{"names":["mount"],"action":"SCMP_ACT_ERRNO","excludes":{"caps":["CAP_SYS_ADMIN"]}}]}`

func TestSeccomp(t *testing.T) {
	const file = "/var/lib/kubelet/seccomp/p.json"
	profile := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	runtimeDefault, unconfined, localhost := runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined, runtimeapi.SecurityProfile_Localhost
	files := func(r *SpecRequest) {
		r.Host.FS = &fakeFS{files: map[string][]byte{file: []byte(testProfile), "/empty": []byte("{}"), "/text": []byte("no")}}
	}
	for _, c := range []struct {
		name  string
		field *runtimeapi.SecurityProfile
		old   string
		want  specs.LinuxSeccompAction // of a system call that the profile does not name; "" = no filter
	}{
		{"nothing said", nil, "", ""},
		{"default", profile(runtimeDefault, ""), "", specs.ActErrno},
		{"unconfined", profile(unconfined, ""), "", ""},
		{"localhost", profile(localhost, file), "", specs.ActAllow},
		{"the field outranks the deprecated string", profile(unconfined, ""), "runtime/default", ""},
		{"deprecated default", nil, "runtime/default", specs.ActErrno},
		{"deprecated unconfined", nil, "unconfined", ""},
		{"deprecated localhost", nil, "localhost/" + file, specs.ActAllow},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, files, security(func(s *securityContext) { s.Seccomp, s.SeccompProfilePath = c.field, c.old }))
			var got specs.LinuxSeccompAction
			if spec.Linux.Seccomp != nil {
				got = spec.Linux.Seccomp.DefaultAction
			}
			if got != c.want {
				t.Errorf("default action %q, want %q", got, c.want)
			}
		})
	}
	for _, c := range []struct {
		class error
		word  string
		field *runtimeapi.SecurityProfile
		old   string
	}{
		{ErrInvalid, "/nowhere", profile(localhost, "/nowhere"), ""},
		{ErrInvalid, "absolute", profile(localhost, "p.json"), ""},
		{ErrInvalid, "absolute", profile(localhost, ""), ""},
		{ErrInvalid, "/empty", profile(localhost, "/empty"), ""},
		{ErrInvalid, "/text", profile(localhost, "/text"), ""},
		{ErrInvalid, "9", profile(9, ""), ""},
		{ErrInvalid, "nonsense", nil, "nonsense"},
	} {
		refused(t, c.class, []string{c.word}, files, security(func(s *securityContext) { s.Seccomp, s.SeccompProfilePath = c.field, c.old }))
	}
	refused(t, ErrUnsupported, []string{"seccomp"}, func(r *SpecRequest) { r.Host.Seccomp = false },
		security(func(s *securityContext) { s.Seccomp = profile(runtimeDefault, "") }))
}

func TestSeccompFollowsTheCapabilities(t *testing.T) {
	allowsMount := func(caps ...string) bool {
		spec, _ := build(t, security(func(s *securityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: caps}
		}))
		return slices.ContainsFunc(spec.Linux.Seccomp.Syscalls, func(s specs.LinuxSyscall) bool {
			return s.Action == specs.ActAllow && len(s.Args) == 0 && slices.Contains(s.Names, "mount")
		})
	}
	if allowsMount() || !allowsMount("SYS_ADMIN") {
		t.Error("mount(2) must be allowed with CAP_SYS_ADMIN, and only with it")
	}
}

func TestAppArmorAndSELinux(t *testing.T) {
	apparmor := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) func(*SpecRequest) {
		return security(func(s *securityContext) {
			s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
		})
	}
	old := func(p string) func(*SpecRequest) { return security(func(s *securityContext) { s.ApparmorProfile = p }) }
	on := func(r *SpecRequest) { r.Host.AppArmor = true }
	for _, ok := range []func(*SpecRequest){old(""), old("runtime/default"), old("unconfined"), apparmor(runtimeapi.SecurityProfile_Unconfined, "")} {
		if spec, _ := build(t, ok); spec.Process.ApparmorProfile != "" {
			t.Errorf("profile %q, want none", spec.Process.ApparmorProfile)
		}
	}
	for _, local := range []func(*SpecRequest){old("localhost/mine"), apparmor(runtimeapi.SecurityProfile_Localhost, "mine")} {
		if spec, _ := build(t, on, local); spec.Process.ApparmorProfile != "mine" {
			t.Errorf("profile %q, want mine", spec.Process.ApparmorProfile)
		}
		refused(t, ErrUnsupported, []string{"AppArmor", "mine", "kernel"}, local)
	}
	refused(t, ErrUnsupported, []string{"AppArmor", "kernel"}, apparmor(runtimeapi.SecurityProfile_RuntimeDefault, ""))
	refused(t, ErrUnsupported, []string{"root"}, on, apparmor(runtimeapi.SecurityProfile_RuntimeDefault, ""))
	refused(t, ErrInvalid, []string{"no profile"}, on, apparmor(runtimeapi.SecurityProfile_Localhost, ""))
	refused(t, ErrInvalid, []string{"what"}, old("what"))
	refused(t, ErrUnsupported, []string{"selinux_options"}, security(func(s *securityContext) { s.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0"} }))
	build(t, security(func(s *securityContext) { s.SelinuxOptions = &runtimeapi.SELinuxOption{} }))
}
