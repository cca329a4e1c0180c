package e2e

import "slices"

// quarters is what a pod of each kind can do, and all that it can: docs/security.md says it in words. Nothing that is not
// named here may get through.
func quarters() []quarter {
	none := object{"capabilities": object{"drop_capabilities": []string{"ALL"}}, "run_as_user": object{"value": 1000}, "no_new_privs": true}
	all := object{"capabilities": object{"add_capabilities": []string{"ALL"}}}
	privileged := object{"privileged": true}

	// Without a seccomp profile the kernel lets everybody make user namespaces (if the host does), which are powerless
	// over what is outside, and use the keyring of the own user id, which the pods of a node share.
	unconfined := []string{"nested user namespace", "nested user namespace: mount tmpfs", "write user keyring"}
	ordinary := []string{"raw sockets"}
	// CAP_SYS_ADMIN takes away what covers /proc, which is one's own mount. What is below is the host's root's, and kept.
	admin := append(slices.Clone(ordinary), "mount tmpfs", "mount proc", "uncover /proc/keys")
	whole := append(slices.Clone(ordinary), "mount tmpfs", "mount proc", "mount sysfs", "write /sys", "write own sysctl")
	// Present on some hosts, and not masked in a privileged container (CRI).
	bare := append(slices.Clone(unconfined), "nested user namespace: mount proc", "write own cgroup", "read /proc/keys",
		"read /proc/timer_list", "read /proc/sched_debug", "list /sys/firmware", "list /proc/acpi", "list /proc/scsi", "list /sys/devices/virtual/powercap")

	seen, signalled, owned := ofEach("see"), ofEach("see", "signal"), ofEach("see", "signal", "trace", "read memory", "write memory",
		"read memory by process_vm_readv", "read environment", "read descriptors", "take a descriptor", "root directory", "join mount namespace")
	stream := []string{"streaming port at 127.0.0.1"} // of the node; without a token nothing comes of it

	return []quarter{
		{name: "no capability", container: none, host: unconfined},
		{name: "default", through: ordinary, host: unconfined},
		{name: "seccomp", container: object{"seccomp": object{"profile_type": 0}}, through: ordinary},
		{name: "all capabilities", container: all, through: admin, host: unconfined},
		{name: "privileged", pod: privileged, through: whole, host: bare},
		{name: "hostPID", pod: namespaces("pid"), through: slices.Concat(ordinary, signalled), host: unconfined},
		{name: "hostPID, no capability", pod: namespaces("pid"), container: none, through: seen, host: unconfined},
		{name: "hostPID, all capabilities", pod: namespaces("pid"), container: all, through: slices.Concat(admin, owned), host: slices.Concat(unconfined, joinedNetwork)},
		{name: "hostPID, privileged", pod: namespaces("pid").with("privileged", true), through: slices.Concat(whole, owned), host: slices.Concat(bare, joinedNetwork)},
		{name: "hostIPC", pod: namespaces("ipc"), through: ordinary, host: unconfined},
		{name: "hostNetwork", pod: namespaces("network"), through: slices.Concat(ordinary, stream), host: unconfined},
		{name: "hostNetwork, privileged", pod: namespaces("network").with("privileged", true), through: slices.Concat(whole, stream), host: bare},
	}
}

// joinedNetwork: one of PID 1's threads is in the node's network namespace, the first one or not. The keeper and the
// daemon are in the host's, which nobody of the node may enter.
var joinedNetwork = []string{"init: join network namespace"}

func ofEach(attempts ...string) []string {
	var out []string
	for _, process := range []string{"init", "keeper", "daemon"} {
		for _, a := range attempts {
			out = append(out, process+": "+a)
		}
	}
	return out
}
