package pod

import (
	"net/netip"
	"path"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/netslirp"
)

// maxHostname is the kernel's __NEW_UTS_LEN.
const maxHostname = 64

// validatePod refuses what cannot be done, before anything is made.
func validatePod(config *runtimeapi.PodSandboxConfig) error {
	m := config.GetMetadata()
	if m.GetName() == "" || m.GetUid() == "" || m.GetNamespace() == "" {
		return invalid("run pod: metadata needs name, uid and namespace, got name %q, uid %q, namespace %q",
			m.GetName(), m.GetUid(), m.GetNamespace())
	}
	if err := validateHostname(config.GetHostname()); err != nil {
		return err
	}
	if dir := config.GetLogDirectory(); dir != "" && !filepath.IsAbs(dir) {
		return invalid("run pod: log_directory %q is not an absolute path", dir)
	}
	if parent := config.GetLinux().GetCgroupParent(); strings.HasSuffix(path.Base(parent), ".slice") {
		// The kubelet of another driver made its cgroups through systemd, elsewhere: the pod's would not be in them.
		return invalid("run pod: cgroup_parent %q is a systemd slice; the cgroup driver of this node is cgroupfs, as RuntimeConfig says: "+
			"give a path like /kubepods/burstable, or set the kubelet's cgroupDriver: cgroupfs", parent)
	}
	sc := config.GetLinux().GetSecurityContext()
	if err := validateNamespaces(sc.GetNamespaceOptions()); err != nil {
		return err
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return invalid("run pod: run_as_group is set without run_as_user")
	}
	if err := validateSysctls(config.GetLinux().GetSysctls(), sc.GetNamespaceOptions()); err != nil {
		return err
	}
	_, err := portMappings(config.GetPortMappings())
	return err
}

func validateHostname(name string) error {
	if len(name) > maxHostname {
		return invalid("run pod: hostname %q has %d bytes, the kernel takes %d", name, len(name), maxHostname)
	}
	if strings.ContainsAny(name, "/\x00 \t\r\n") {
		return invalid("run pod: hostname %q has characters that no hostname has", name)
	}
	return nil
}

func validateNamespaces(o *runtimeapi.NamespaceOption) error {
	const (
		podMode       = runtimeapi.NamespaceMode_POD
		containerMode = runtimeapi.NamespaceMode_CONTAINER
		nodeMode      = runtimeapi.NamespaceMode_NODE
	)
	for _, n := range []struct {
		kind    string
		mode    runtimeapi.NamespaceMode
		allowed []runtimeapi.NamespaceMode
	}{
		{"network", o.GetNetwork(), []runtimeapi.NamespaceMode{podMode, nodeMode}},
		{"ipc", o.GetIpc(), []runtimeapi.NamespaceMode{podMode, nodeMode}},
		{"pid", o.GetPid(), []runtimeapi.NamespaceMode{podMode, containerMode, nodeMode}},
	} {
		ok := false
		for _, mode := range n.allowed {
			ok = ok || n.mode == mode
		}
		if !ok {
			return invalid("run pod: %s namespace mode %s is not one that a sandbox can have", n.kind, n.mode)
		}
	}
	return validateUsers(o.GetUsernsOptions())
}

// validateUsers: a nil message is a kubelet that asks for nothing, be it that the CRI calls it mode POD.
func validateUsers(users *runtimeapi.UserNamespace) error {
	if users == nil {
		return nil
	}
	mappings := len(users.GetUids()) + len(users.GetGids())
	switch users.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if mappings > 0 {
			return invalid("run pod: user namespace mode NODE takes no id mappings")
		}
		return nil
	case runtimeapi.NamespaceMode_POD:
		if mappings > 0 {
			if err := validateIDs("uids", users.GetUids()); err != nil {
				return err
			}
			if err := validateIDs("gids", users.GetGids()); err != nil {
				return err
			}
		}
		return unsupported("run pod: a user namespace of the pod's own (userns_options mode POD) does not work on a rootless node: " +
			"the kernel cannot map the ids of volumes and images there; set hostUsers: true")
	}
	return invalid("run pod: user namespace mode %s is neither POD nor NODE", users.GetMode())
}

// validateIDs: the kubelet sends one range, and with it the root of the pod.
func validateIDs(name string, ids []*runtimeapi.IDMapping) error {
	if len(ids) != 1 {
		return invalid("run pod: userns_options has %d mappings in %s; there must be exactly one", len(ids), name)
	}
	if m := ids[0]; m.GetContainerId() != 0 || m.GetLength() == 0 {
		return invalid("run pod: userns_options maps %d ids from container id %d in %s; the mapping must have container id 0",
			m.GetLength(), m.GetContainerId(), name)
	}
	return nil
}

// portMappings returns those that publish a port; host_port 0 means that none is wanted.
func portMappings(in []*runtimeapi.PortMapping) ([]netslirp.PortMapping, error) {
	var out []netslirp.PortMapping
	for _, m := range in {
		host, target := m.GetHostPort(), m.GetContainerPort()
		if host < 0 || host > 65535 || target < 0 || target > 65535 {
			return nil, invalid("run pod: port mapping %d to %d is outside 0-65535", host, target)
		}
		if host == 0 {
			continue
		}
		if target == 0 {
			return nil, invalid("run pod: host port %d has no container port", host)
		}
		if ip := m.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return nil, invalid("run pod: host_ip of host port %d: %v", host, err)
			}
		}
		var protocol string
		switch m.GetProtocol() {
		case runtimeapi.Protocol_TCP:
			protocol = "tcp"
		case runtimeapi.Protocol_UDP:
			protocol = "udp"
		case runtimeapi.Protocol_SCTP:
			return nil, unsupported("run pod: host port %d asks for SCTP, which no user-mode network carries; use TCP or UDP", host)
		default:
			return nil, invalid("run pod: host port %d: protocol %s is unknown", host, m.GetProtocol())
		}
		out = append(out, netslirp.PortMapping{
			Protocol: protocol, HostPort: int(host), ContainerPort: int(target), HostIP: m.GetHostIp(),
		})
	}
	return out, nil
}

// validateContainer refuses what does not depend on the image; ctr.BuildSpec refuses the rest.
func validateContainer(config *runtimeapi.ContainerConfig, sandbox *runtimeapi.PodSandboxConfig) error {
	if config.GetMetadata().GetName() == "" {
		return invalid("create container: metadata needs a name")
	}
	if config.GetImage().GetImage() == "" {
		return invalid("create container %q: no image is named", config.GetMetadata().GetName())
	}
	if config.GetLinux().GetSecurityContext().GetPrivileged() && !sandbox.GetLinux().GetSecurityContext().GetPrivileged() {
		// "If a privileged container is to be executed within it, this MUST be true."
		return invalid("create container %q: it is privileged, its sandbox is not", config.GetMetadata().GetName())
	}
	return validateShared(config, sandbox.GetLinux().GetSecurityContext().GetNamespaceOptions())
}

// validateShared: network and IPC namespace are the sandbox's, POD is what a request without options says. One that
// asks for the node's where the sandbox has its own would get less than it says.
func validateShared(config *runtimeapi.ContainerConfig, sandbox *runtimeapi.NamespaceOption) error {
	own := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for _, n := range []struct {
		kind      string
		own, pods runtimeapi.NamespaceMode
	}{{"network", own.GetNetwork(), sandbox.GetNetwork()}, {"ipc", own.GetIpc(), sandbox.GetIpc()}} {
		if n.own != runtimeapi.NamespaceMode_POD && n.own != n.pods {
			return invalid("create container %q: %s namespace mode %s: the sandbox was made with mode %s, and its containers share that",
				config.GetMetadata().GetName(), n.kind, n.own, n.pods)
		}
	}
	return nil
}

// logPath joins the two halves of the CRI's log path. It must stay below the sandbox's directory.
func logPath(sandbox *runtimeapi.PodSandboxConfig, config *runtimeapi.ContainerConfig) (string, error) {
	dir, name := sandbox.GetLogDirectory(), config.GetLogPath()
	if dir == "" || name == "" {
		return "", nil
	}
	if !filepath.IsLocal(name) || filepath.Clean(name) == "." {
		return "", invalid("create container %q: log_path %q leaves the log directory of its sandbox",
			config.GetMetadata().GetName(), name)
	}
	return filepath.Join(dir, name), nil
}
