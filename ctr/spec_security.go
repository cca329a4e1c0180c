package ctr

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// allCapabilities are those of Linux 5.9 and later, in the order of linux/capability.h.
var allCapabilities = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL
	CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN
	CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT
	CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE
	CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM
	CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)

// defaultCapabilities are those of a container that asks for nothing, as in every engine of this field.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// capabilities sets the five sets. All of them count inside the node's user namespace only.
func (b *builder) capabilities() error {
	if b.security.GetPrivileged() {
		b.spec.Process.Capabilities = capabilitySets(allCapabilities, nil)
		return nil
	}
	caps := b.security.GetCapabilities()
	add, addAll, err := capabilityNames(caps.GetAddCapabilities())
	if err != nil {
		return err
	}
	drop, dropAll, err := capabilityNames(caps.GetDropCapabilities())
	if err != nil {
		return err
	}
	ambient, ambientAll, err := capabilityNames(caps.GetAddAmbientCapabilities())
	if err != nil {
		return err
	}
	// A name outranks "ALL", and a drop outranks an add: drop ALL add X is X, add ALL drop X is all but X.
	set := defaultCapabilities
	switch {
	case dropAll:
		set = nil
	case addAll:
		set = allCapabilities
	}
	set = slices.Concat(set, add)
	if ambientAll {
		ambient = allCapabilities
	}
	set = slices.Concat(set, ambient)
	dropped := func(c string) bool { return slices.Contains(drop, c) }
	set = slices.DeleteFunc(set, dropped)
	ambient = slices.DeleteFunc(slices.Clone(ambient), dropped)
	b.spec.Process.Capabilities = capabilitySets(set, ambient)
	return nil
}

// capabilitySets: an ambient capability must be permitted and inheritable as well, or the kernel refuses it
// (capabilities(7)). Nothing else is inheritable: a non-root process could otherwise gain it from a file.
func capabilitySets(set, ambient []string) *specs.LinuxCapabilities {
	set = sortedUnique(set)
	ambient = sortedUnique(ambient)
	return &specs.LinuxCapabilities{
		Bounding: set, Effective: slices.Clone(set), Permitted: slices.Clone(set),
		Inheritable: ambient, Ambient: slices.Clone(ambient),
	}
}

func sortedUnique(in []string) []string {
	out := slices.Clone(in)
	slices.Sort(out)
	return slices.Compact(out)
}

// capabilityNames normalises names with and without CAP_, in any case, and tells whether "ALL" is among them.
func capabilityNames(in []string) (names []string, all bool, err error) {
	for _, raw := range in {
		name := strings.ToUpper(raw)
		if name == "ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		if !slices.Contains(allCapabilities, name) {
			return nil, false, invalid("capability %q is unknown", raw)
		}
		names = append(names, name)
	}
	return names, all, nil
}

// privileges sets no_new_privs and deals with the kernel's security modules.
func (b *builder) privileges() error {
	b.spec.Process.NoNewPrivileges = b.security.GetNoNewPrivs()
	if b.security.GetPrivileged() {
		// "If privileged is set, [...] selinux_options, seccomp, apparmor [...] MAY have no effect" (CRI).
		return nil
	}
	if err := checkSELinux(b.security.GetSelinuxOptions()); err != nil {
		return err
	}
	var err error
	old := b.security.GetApparmorProfile() //nolint:staticcheck // the kubelet of older clusters sends it
	b.spec.Process.ApparmorProfile, err = appArmor(b.security.GetApparmor(), old, b.req.Host)
	return err
}

func checkSELinux(s *runtimeapi.SELinuxOption) error {
	if s.GetUser()+s.GetRole()+s.GetType()+s.GetLevel() != "" {
		return unsupported("selinux_options: containers of a rootless node are not labelled; leave them out")
	}
	return nil
}

// appArmor returns the profile that a process enters, "" for none. It takes it from the field or, where that is absent,
// from its deprecated string, in which "runtime/default" is "equivalent to not specifying a profile" (CRI).
func appArmor(profile *runtimeapi.SecurityProfile, old string, host Host) (string, error) {
	if profile == nil {
		switch local, isLocal := strings.CutPrefix(old, "localhost/"); {
		case old == "" || old == "runtime/default" || old == "unconfined":
			return "", nil
		case isLocal:
			profile = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: local}
		default:
			return "", invalid("apparmor profile %q: runtime/default, unconfined or localhost/NAME", old)
		}
	}
	name := strings.TrimPrefix(profile.GetLocalhostRef(), "localhost/")
	switch profile.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		return "", nil
	case runtimeapi.SecurityProfile_Localhost:
		if name == "" {
			return "", invalid("apparmor: type Localhost names no profile")
		}
		if !host.AppArmor {
			return "", unsupported("apparmor profile %s: AppArmor is not on in this kernel", name)
		}
		return name, nil
	case runtimeapi.SecurityProfile_RuntimeDefault:
		if !host.AppArmor {
			return "", unsupported("apparmor profile RuntimeDefault: AppArmor is not on in this kernel")
		}
		return "", unsupported("apparmor profile RuntimeDefault: a runtime without root cannot load a profile; " +
			"ask for Unconfined, or for a Localhost profile that root has loaded")
	}
	return "", invalid("apparmor: profile type %d is unknown", profile.GetProfileType())
}
