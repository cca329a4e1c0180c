#!/bin/bash
# Runs a node of rootless containerd in the foreground: `node.sh PROGRAMS DIR PAUSE`. PROGRAMS is what `make peer` built,
# DIR a directory of its own for everything that the node keeps (its CRI socket is DIR/cri.sock), PAUSE the image of a
# sandbox's process. It is set up as containerd's documentation of rootless mode has it: RootlessKit with slirp4netns, a
# cgroup namespace, the overlayfs snapshotter, and the network of containerd's own script/setup/install-cni, IPv4 alone.
set -euo pipefail

programs=$1 dir=$2 pause=$3

if [ "${4:-}" != inside ]; then
	mkdir -p "$dir/rootlesskit" "$dir/etc/cni"
	exec "$programs/rootlesskit" --state-dir="$dir/rootlesskit" --net=slirp4netns --mtu=65520 --slirp4netns-sandbox=false --slirp4netns-seccomp=auto \
		--disable-host-loopback --port-driver=builtin --copy-up=/etc --copy-up=/run --copy-up=/var/lib --propagation=rslave \
		--pidns --cgroupns --ipcns --utsns --reaper=auto -- "$0" "$programs" "$dir" "$pause" inside
fi

# In the node: the cgroup namespace's own subtree, with this process out of the way of the containers' cgroups.
if mount -t tmpfs none /sys/fs/cgroup 2>/dev/null; then
	mount -t cgroup2 none /sys/fs/cgroup
	mkdir -p /sys/fs/cgroup/node
	for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo "$pid" >/sys/fs/cgroup/node/cgroup.procs 2>/dev/null || true; done
	for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$c" >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true; done
fi
runtime=$programs/runc
# Without a delegated cpu controller runc would fail every sandbox.
grep -qw cpu /sys/fs/cgroup/cgroup.controllers 2>/dev/null || runtime=$programs/nolimits
# NoNewKeyring: a user may have 200 keys (kernel.keys.maxkeys), and each container would take one.
cat >"$dir/etc/config.toml" <<-END
	version = 3
	root = "$dir/root"
	state = "$dir/state"
	disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.native", "io.containerd.snapshotter.v1.erofs",
		"io.containerd.differ.v1.erofs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp"]
	[grpc]
	  address = "$dir/cri.sock"
	[plugins."io.containerd.cri.v1.images".pinned_images]
	  sandbox = "$pause"
	[plugins."io.containerd.cri.v1.runtime"]
	  disable_apparmor = true
	  restrict_oom_score_adj = true
	  tolerate_missing_hugetlb_controller = true
	  disable_hugetlb_controller = true
	  [plugins."io.containerd.cri.v1.runtime".cni]
	    bin_dirs = ["$programs/cni"]
	    conf_dir = "$dir/etc/cni"
	  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
	    runtime_type = "io.containerd.runc.v2"
	    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
	      BinaryName = "$runtime"
	      NoNewKeyring = true
	      SystemdCgroup = false
END
cat >"$dir/etc/cni/10-containerd-net.conflist" <<-END
	{"cniVersion": "1.0.0", "name": "containerd-net", "plugins": [
	  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "promiscMode": true,
	   "ipam": {"type": "host-local", "dataDir": "$dir/networks", "ranges": [[{"subnet": "10.89.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
	  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
rm -rf /run/containerd /run/xtables.lock /var/lib/cni
export PATH=$programs:$PATH
# containerd is started again when it ends, as a service manager does.
while :; do
	containerd --config "$dir/etc/config.toml" >>"$dir/log" 2>&1 &
	echo $! >"$dir/daemon.pid"
	wait $! || true
	[ ! -e "$dir/stop" ] || exit 0
done
