package ctr

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PauseRequest is all that the spec of a pod's PID 1 depends on.
type PauseRequest struct {
	Rootfs      string // what EnsurePause wrote
	Pod         *runtimeapi.PodSandboxConfig
	Namespaces  Namespaces // the pod's; PID must be empty: it makes that namespace
	CgroupsPath string     // "" = none
	Host        Host
}

// pauseID is the user that pause runs as where the pod names none: nobody.
const pauseID = 65534

// pauseLayout is all that is in pause's root filesystem: the program, and two places to mount on.
var pauseLayout = struct {
	program string
	dirs    []string
}{"pause", []string{"dev", "proc"}}

// pauseMode is the program's: everybody may execute it, and nobody write.
const pauseMode = 0o555

// EnsurePause makes dir the read-only root filesystem of pause for this machine's architecture. It may be called
// while pods use it: the program is replaced by rename, and only where it differs. What is in the place of something of
// it and is of another kind goes.
func EnsurePause(dir string) error {
	dir = filepath.Clean(dir)
	program, err := pauseELF(runtime.GOARCH)
	if err != nil {
		return err
	}
	for _, d := range append([]string{""}, pauseLayout.dirs...) {
		if err := makeWay(filepath.Join(dir, d), true); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return fmt.Errorf("make root filesystem of pause: %w", err)
		}
	}
	path := filepath.Join(dir, pauseLayout.program)
	if err := errors.Join(makeWay(path, false), makeWay(dir+".tmp", false)); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if have, rerr := os.ReadFile(path); err != nil || rerr != nil || info.Mode().Perm() != pauseMode || !bytes.Equal(have, program) {
		if err := writeProgram(dir, path, program); err != nil {
			return fmt.Errorf("write pause: %w", err)
		}
	}
	return nil
}

// makeWay removes what is at path where that is a directory and should be none, or the other way round.
func makeWay(path string, directory bool) error {
	info, err := os.Lstat(path)
	if err != nil || info.IsDir() == directory {
		return nil // not there, most likely; else the next step says why it cannot be used
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("make way for pause: %w", err)
	}
	return nil
}

// writeProgram writes beside dir, so that the root filesystem never holds more than pause. The name is fixed: what a
// crash left is overwritten.
func writeProgram(dir, path string, program []byte) error {
	temporary := dir + ".tmp"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = f.Write(program)
	err = errors.Join(err, f.Chmod(pauseMode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// PauseSpec makes the spec of the PID 1 of a pod whose containers share a pid namespace. It has a root filesystem
// of its own, so that /proc/1/root shows the pod nothing of the node; no capability, no way to gain one, and a
// /proc that is read-only and masked. It takes no input, so it gets no seccomp filter: compiling one would cost
// more than all the rest of its start.
func PauseSpec(req PauseRequest) (*specs.Spec, error) {
	if req.Namespaces.PID != "" || req.Namespaces.HostPID {
		return nil, invalid("pause makes the pid namespace of its pod, and joins none")
	}
	list, err := namespaceList(req.Namespaces)
	if err != nil {
		return nil, err
	}
	u, err := pauseUser(req.Pod.GetLinux().GetSecurityContext(), req.Host.IDs)
	if err != nil {
		return nil, err
	}
	root, err := rootOf(req.Rootfs, true, req.Host.FS)
	if err != nil {
		return nil, err
	}
	profile := ""
	if security := req.Pod.GetLinux().GetSecurityContext(); !security.GetPrivileged() { // "AppArmor confinement is not applied"
		if profile, err = appArmor(security.GetApparmor(), "", req.Host); err != nil {
			return nil, err
		}
	}
	spec := &specs.Spec{
		Version: specs.Version,
		Root:    root,
		Process: &specs.Process{
			User: u, Args: []string{"/" + pauseLayout.program}, Env: []string{"PATH=/"}, Cwd: "/",
			Capabilities: &specs.LinuxCapabilities{}, NoNewPrivileges: true, ApparmorProfile: profile,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "ro", "mode=755", "size=64k"}},
		},
		Linux: &specs.Linux{Namespaces: list, MaskedPaths: slices.Clone(defaultMaskedPaths)},
	}
	if req.Host.CgroupUsable && req.CgroupsPath != "" {
		spec.Linux.CgroupsPath = req.CgroupsPath
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return spec, nil
}

// CheckSandbox refuses what no sandbox can have here, whether or not a process of its own runs in it. The security
// context of a sandbox "does not apply to containers in the pods" (CRI); where it asks for a confinement that this
// node cannot give, they would be refused one after another.
func CheckSandbox(sc *runtimeapi.LinuxSandboxSecurityContext, host Host) error {
	if p := sc.GetSupplementalGroupsPolicy(); runtimeapi.SupplementalGroupsPolicy_name[int32(p)] == "" {
		return invalid("sandbox: supplemental_groups_policy %d is unknown", p)
	}
	if s := sc.GetSeccomp(); runtimeapi.SecurityProfile_ProfileType_name[int32(s.GetProfileType())] == "" {
		return invalid("sandbox: seccomp profile type %d is unknown", s.GetProfileType())
	}
	if sc.GetPrivileged() {
		return nil // "AppArmor confinement is not applied", "SELinux restrictions are not applied" (CRI)
	}
	if err := checkSELinux(sc.GetSelinuxOptions()); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if _, err := appArmor(sc.GetApparmor(), "", host); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	return nil
}

// pauseUser: "UID to run sandbox processes as, when applicable"; "run_as_group should only be specified when
// run_as_user is specified; otherwise, the runtime MUST error" (CRI).
func pauseUser(sc *runtimeapi.LinuxSandboxSecurityContext, ids IDMap) (specs.User, error) {
	uid, gid := int64(pauseID), int64(pauseID)
	if !ids.HasUID(uid) || !ids.HasGID(gid) {
		uid, gid = 0, 0 // a node with a single id
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return specs.User{}, invalid("run_as_group %d of the sandbox without run_as_user", sc.GetRunAsGroup().GetValue())
	}
	if sc.GetRunAsUser() != nil {
		uid, gid = sc.GetRunAsUser().GetValue(), sc.GetRunAsGroup().GetValue()
	}
	if !ids.HasUID(uid) {
		return specs.User{}, unmapped("uid", uid, ids.UIDs)
	}
	if !ids.HasGID(gid) {
		return specs.User{}, unmapped("gid", gid, ids.GIDs)
	}
	return specs.User{UID: uint32(uid), GID: uint32(gid)}, nil
}
