package keeper_test

import (
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// spec is a container of the test's root filesystem with a pid namespace of its own.
func spec(args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: filepath.Join(base, "rootfs")},
		Process: process(args...),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}},
	}
}

func process(args ...string) *specs.Process {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"}
	return &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"},
		Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}}
}

func sh(script string) *specs.Spec { return spec("/bin/sh", "-c", script) }

// pidNamespace makes the container join path; "" is the keeper's own.
func pidNamespace(s *specs.Spec, path string) *specs.Spec {
	var out []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			if path == "" {
				continue
			}
			ns.Path = path
		}
		out = append(out, ns)
	}
	s.Linux.Namespaces = out
	return s
}

// administrator lets the container mount.
func administrator(s *specs.Spec) *specs.Spec {
	c := s.Process.Capabilities
	c.Bounding = append(c.Bounding, "CAP_SYS_ADMIN")
	c.Effective, c.Permitted = c.Bounding, c.Bounding
	return s
}
