package ctr

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPauseIsASmallStaticExecutableOfEachArchitecture(t *testing.T) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		raw, err := pauseELF(arch)
		if err != nil {
			t.Fatal(err)
		}
		f, err := elf.NewFile(bytes.NewReader(raw))
		if err != nil {
			t.Fatalf("%s: %v", arch, err)
		}
		if f.Machine != machine || f.Type != elf.ET_EXEC || len(raw) > 300 || len(f.Progs) != 2 {
			t.Errorf("%s: %s, %s, %d bytes, %d segments", arch, f.Machine, f.Type, len(raw), len(f.Progs))
		}
		load, stack := f.Progs[0], f.Progs[1]
		if load.Flags&elf.PF_W != 0 || stack.Type != elf.PT_GNU_STACK || stack.Flags&elf.PF_X != 0 {
			t.Errorf("%s: segments %v", arch, f.Progs)
		}
		code := raw[f.Entry-load.Vaddr:]
		if len(code) != pauseSize {
			t.Errorf("%s: %d bytes of code and data, want %d", arch, len(code), pauseSize)
		}
		if mask := binary.LittleEndian.Uint64(code[pauseMask:]); mask != 0x4002 {
			t.Errorf("%s: mask %#x, want SIGINT and SIGTERM", arch, mask)
		}
		if handler := binary.LittleEndian.Uint64(code[pauseAct:]); handler != 1 {
			t.Errorf("%s: handler %d, want SIG_IGN", arch, handler)
		}
	}
	if _, err := pauseELF("mips"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("mips: %v, want ErrUnsupported", err)
	}
}

func TestEnsurePauseWritesAReadOnlyRootWithNothingElse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pause")
	want, err := pauseELF(runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		if err := EnsurePause(dir); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, "pause"))
		if err != nil || !bytes.Equal(raw, want) {
			t.Fatalf("pause: %d bytes, %v", len(raw), err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 3 {
			t.Errorf("entries %v, %v; want dev, pause and proc", entries, err)
		}
		for p, want := range map[string]os.FileMode{"": 0o755, "pause": 0o555, "dev": 0o755, "proc": 0o755} {
			if info, err := os.Stat(filepath.Join(dir, p)); err != nil || info.Mode().Perm() != want {
				t.Errorf("%q: %v, %v; want %v", p, info.Mode(), err, want)
			}
		}
		if left, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(left) != 1 {
			t.Errorf("left beside it: %v, %v", left, err)
		}
	}
	check()
	before, err := os.Stat(filepath.Join(dir, "pause"))
	if err != nil {
		t.Fatal(err)
	}
	check()
	if after, err := os.Stat(filepath.Join(dir, "pause")); err != nil || !os.SameFile(before, after) {
		t.Error("the same program was written again")
	}
	path := filepath.Join(dir, "pause")
	for name, damage := range map[string]func() error{
		"mode":                func() error { return os.Chmod(path, 0) },
		"directory":           func() error { return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "in"), 0o700)) },
		"temporary directory": func() error { return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(dir+".tmp", "in"), 0o700)) },
		"root":                func() error { return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)) },
		"proc": func() error {
			return errors.Join(os.Remove(filepath.Join(dir, "proc")), os.WriteFile(filepath.Join(dir, "proc"), nil, 0o600))
		},
	} {
		if err := damage(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		check()
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "pause")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pause"), []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	check()
}

func TestPauseSpec(t *testing.T) {
	host := request().Host
	base := PauseRequest{Rootfs: testRootfs + "/", Namespaces: Namespaces{Net: "/n", IPC: "/i", UTS: "/u"}, CgroupsPath: "/pods/p/pause", Host: host}
	spec, err := PauseSpec(base)
	if err != nil {
		t.Fatal(err)
	}
	p := spec.Process
	if p.User.UID != 65534 || p.User.GID != 65534 || !p.NoNewPrivileges || len(p.Capabilities.Bounding) != 0 {
		t.Errorf("process %+v", p)
	}
	if spec.Root.Path != testRootfs || !spec.Root.Readonly || len(spec.Linux.MaskedPaths) == 0 || spec.Linux.CgroupsPath != "" {
		t.Errorf("root %+v, linux %+v", spec.Root, spec.Linux)
	}
	if proc := mountAt(spec, "/proc"); proc == nil || proc.Options[3] != "ro" {
		t.Errorf("/proc %+v, want read-only", proc)
	}
	sandbox := func(sc *runtimeapi.LinuxSandboxSecurityContext) PauseRequest {
		r := base
		r.Pod = &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: sc}}
		return r
	}
	if spec, err = PauseSpec(sandbox(&runtimeapi.LinuxSandboxSecurityContext{RunAsUser: id(7), RunAsGroup: id(8)})); err != nil ||
		spec.Process.User.UID != 7 || spec.Process.User.GID != 8 {
		t.Errorf("run_as_user 7, group 8: %+v, %v", spec, err)
	}
	if _, err = PauseSpec(sandbox(&runtimeapi.LinuxSandboxSecurityContext{RunAsGroup: id(8)})); !errors.Is(err, ErrInvalid) {
		t.Errorf("group without user: %v, want ErrInvalid", err)
	}
	if _, err = PauseSpec(sandbox(&runtimeapi.LinuxSandboxSecurityContext{RunAsUser: id(1 << 20)})); !errors.Is(err, ErrUnsupported) {
		t.Errorf("unmapped user: %v, want ErrUnsupported", err)
	}
	joining := base
	joining.Namespaces.PID = "/p"
	if _, err = PauseSpec(joining); !errors.Is(err, ErrInvalid) {
		t.Errorf("with a pid namespace: %v, want ErrInvalid", err)
	}
	single := base
	single.Host.IDs = IDMap{UIDs: []IDRange{{0, 1}}, GIDs: []IDRange{{0, 1}}}
	single.Host.CgroupUsable = true
	if spec, err = PauseSpec(single); err != nil || spec.Process.User.UID != 0 || spec.Linux.CgroupsPath != "/pods/p/pause" {
		t.Errorf("single id: %+v, %v", spec, err)
	}
}

func TestCheckSandbox(t *testing.T) {
	type sc = runtimeapi.LinuxSandboxSecurityContext
	profile := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	labelled := &runtimeapi.SELinuxOption{Level: "s0:c1,c2"}
	local := profile(runtimeapi.SecurityProfile_Localhost, "mine")
	for _, c := range []struct {
		name     string
		sc       *sc
		appArmor bool
		want     error
	}{
		{"nothing", nil, false, nil},
		{"the kubelet's", &sc{Seccomp: profile(runtimeapi.SecurityProfile_RuntimeDefault, ""), SupplementalGroups: []int64{1}}, false, nil},
		{"policy Strict", &sc{SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict}, false, nil},
		{"policy unknown", &sc{SupplementalGroupsPolicy: 7}, false, ErrInvalid},
		{"seccomp unknown", &sc{Seccomp: profile(7, "")}, false, ErrInvalid},
		{"SELinux", &sc{SelinuxOptions: labelled}, false, ErrUnsupported},
		{"SELinux, privileged", &sc{SelinuxOptions: labelled, Privileged: true}, false, nil},
		{"AppArmor that is not on", &sc{Apparmor: local}, false, ErrUnsupported},
		{"AppArmor Unconfined", &sc{Apparmor: profile(runtimeapi.SecurityProfile_Unconfined, "")}, false, nil},
		{"AppArmor that is on", &sc{Apparmor: local}, true, nil},
		{"AppArmor, its default", &sc{Apparmor: profile(runtimeapi.SecurityProfile_RuntimeDefault, "")}, true, ErrUnsupported},
		{"AppArmor, no name", &sc{Apparmor: profile(runtimeapi.SecurityProfile_Localhost, "")}, true, ErrInvalid},
	} {
		if err := CheckSandbox(c.sc, Host{AppArmor: c.appArmor}); !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), "sandbox") {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	req := PauseRequest{
		Rootfs: testRootfs, Namespaces: Namespaces{Net: "/n", IPC: "/i", UTS: "/u"}, Host: request().Host,
		Pod: &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &sc{Apparmor: local}}},
	}
	req.Host.AppArmor = true
	if spec, err := PauseSpec(req); err != nil || spec.Process.ApparmorProfile != "mine" {
		t.Errorf("pause: %+v, %v; want the profile of the sandbox", spec, err)
	}
	req.Host.AppArmor, req.Pod.Linux.SecurityContext.Privileged = false, true
	if spec, err := PauseSpec(req); err != nil || spec.Process.ApparmorProfile != "" {
		t.Errorf("pause of a privileged sandbox: %+v, %v; want no profile", spec, err)
	}
}
