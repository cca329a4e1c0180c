#!/bin/bash
# Makes a fresh Debian or Ubuntu ready for coracle: `scripts/setup.sh [--demo | --bench | --test | --vm | --kube] [--user NAME]`.
#
# Says what it is going to change and why before it does, uses sudo where it is not started as root, and does, asks
# and prints nothing where nothing is missing. --demo adds what the demo needs, --bench what the benchmark's peer needs
# besides, --test what the end-to-end tests need, --vm what those in a virtual machine need besides, --kube what a Kubernetes cluster needs;
# --user names the account that is going to run coracle (default: the calling one).
set -euo pipefail
. "$(dirname "$0")/lib.sh"

user=$(id -un) demo='' bench='' test='' vm='' kube=''
while [ $# -gt 0 ]; do
	case $1 in
	--demo) demo=1 ;;
	--bench) demo=1 bench=1 ;;
	--test) demo=1 test=1 ;;
	--vm) demo=1 vm=1 ;;
	--kube) demo=1 kube=1 ;;
	--user) user=$2 && shift ;;
	*) die "usage: setup.sh [--demo | --bench | --test | --vm | --kube] [--user NAME]" ;;
	esac
	shift
done

# what is wanted: package, and what it is for
packages() {
	cat <<-END
		gcc            compiles the C part of libcontainer
		libc6-dev      the C library's headers, for the same
		make           runs the Makefile
		pkg-config     finds libseccomp for the compiler
		libseccomp-dev the keeper links it: seccomp profiles
		uidmap         newuidmap and newgidmap: your subordinate ids in a user namespace
		slirp4netns    the user-mode network of a node
		iproute2       ip, which sets that network up
		util-linux     nsenter and setpriv
		curl           fetches Go where it is missing; scripts/cluster waits for the API server with it
		unzip          unpacks it
		ca-certificates trust for https
	END
	[ -z "$demo" ] || cat <<-END
		busybox-static the small image that is built on the spot
	END
	[ -z "$bench" ] || cat <<-END
		iptables       by which the peer's network plugins set up masquerading
	END
	[ -z "$kube" ] || cat <<-END
		nftables       nft, by which kube-proxy sets up services
		netbase        /etc/protocols, without which it takes its own services away again
	END
	[ -z "$test$kube" ] || cat <<-END
		crun           an OCI runtime: runtime handlers are tested with it
	END
	[ -z "$test" ] || cat <<-END
		debootstrap    builds the test image of a real distribution
		zstd           packs it
		btrfs-progs    makes a filesystem with a quota
	END
	[ -z "$vm" ] || cat <<-END
		qemu-system-x86 runs the test VM
		debootstrap    builds its root file system
		e2fsprogs      mke2fs makes disks of directories
	END
}

install_packages() {
	command -v dpkg-query >/dev/null || {
		missing=
		for tool in gcc make pkg-config newuidmap newgidmap slirp4netns ip nsenter ${test:+crun}; do
			command -v $tool >/dev/null || missing="$missing $tool"
		done
		[ -z "$missing" ] || die "this is neither Debian nor Ubuntu: install by hand what gives you$missing"
		return 0
	}
	local missing=() name why
	while read -r name why; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] && continue
		[ ${#missing[@]} -gt 0 ] || say "installing with apt-get, as root:"
		missing+=("$name")
		printf '     %-15s %s\n' "$name" "$why" >&2
	done < <(packages)
	[ ${#missing[@]} -gt 0 ] || return 0
	as_root apt-get -qq update
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# free_id prints the first id above every range of both files, since ranges of two users must not overlap.
free_id() {
	{ echo x:100000:0; cat /etc/subuid /etc/subgid 2>/dev/null; } |
		awk -F: 'NF == 3 && $2 + $3 > top { top = $2 + $3 } END { print top }'
}

add_subids() {
	[ "$user" != root ] || return 0 # the tests and the demo drop to an account of their own
	local file first
	for file in /etc/subuid /etc/subgid; do
		grep -qE "^($user|$(id -u "$user")):" $file 2>/dev/null && continue
		first=$(free_id)
		say "giving $user the subordinate ids $first-$((first + 65535)) in $file, as root: the ids of its containers"
		as_root touch $file
		as_root usermod "--add-${file#/etc/}s" "$first-$((first + 65535))" "$user"
	done
}

open_tun() {
	if [ ! -c /dev/net/tun ]; then
		say "making /dev/net/tun, as root: the user-mode network makes its interface with it"
		as_root modprobe tun 2>/dev/null || true
		as_root mkdir -p /dev/net
		[ -c /dev/net/tun ] || as_root mknod /dev/net/tun c 10 200
	fi
	case $(stat -c %a /dev/net/tun) in
	*[67]) ;;
	*)
		say "opening /dev/net/tun to all users (mode 0666, as distributions have it), as root"
		as_root chmod 0666 /dev/net/tun
		;;
	esac
}

sysctl_of() { cat "/proc/sys/$1" 2>/dev/null || echo "$2"; }

# check_userns tells about a kernel that keeps user namespaces from ordinary users. It changes nothing there: that is
# the administrator's decision.
check_userns() {
	[ "$(sysctl_of user/max_user_namespaces 1)" != 0 ] ||
		die "this kernel lets users make no user namespaces; to change that, run: sudo sysctl -w user.max_user_namespaces=28633"
	[ "$(sysctl_of kernel/unprivileged_userns_clone 1)" != 0 ] ||
		die "this kernel keeps user namespaces from ordinary users; to change that, run: sudo sysctl -w kernel.unprivileged_userns_clone=1"
	[ "$(sysctl_of kernel/apparmor_restrict_unprivileged_userns 0)" = 1 ] || return 0
	[ "$(cat /proc/self/attr/current 2>/dev/null)" = unconfined ] || return 0
	allow_by_apparmor
}

# allow_by_apparmor: since Ubuntu 23.10 AppArmor grants capabilities in a user namespace only to programs with a
# profile. One file names the programs that are built in this checkout and in the copy of the tests' account: coracle,
# the helpers of the demo and of scripts/cluster, and the test programs, and nothing else.
allow_by_apparmor() {
	local file=/etc/apparmor.d/coracle-checkout place program profile number=0
	profile=$(
		echo "abi <abi/4.0>,"
		for place in "$REPO" "$TEST_HOME/src"; do
			for program in bin/coracle .cache/race/coracle .cache/bin/loopback .cache/kube/clusterkit '.cache/tmp/**.test'; do
				number=$((number + 1))
				echo "profile coracle-checkout-$number \"$place/$program\" flags=(unconfined) { userns, }"
			done
		done
	)
	[ "$(cat $file 2>/dev/null)" != "$profile" ] || return 0
	say "allowing user namespaces to the programs built in this checkout, as root, by the AppArmor profile $file"
	printf '%s\n' "$profile" | as_root tee $file >/dev/null
	as_root apparmor_parser -r $file ||
		die "load $file; the other way is to run: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
}

install_packages
add_subids
open_tun
check_userns
[ -z "$test" ] || "$REPO/scripts/debian-rootfs.sh"
[ -z "$vm" ] || "$REPO/scripts/vm-image.sh"
