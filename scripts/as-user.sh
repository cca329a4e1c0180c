#!/bin/bash
# Runs a command in this checkout as an ordinary user: `scripts/as-user.sh COMMAND [ARG...]`.
#
# Started by an ordinary user, it runs the command here, with an XDG_RUNTIME_DIR made where the session has none.
# Started as root, it makes the account of the tests (lib.sh; set-up takes place for it), gives it a copy of the checkout,
# a runtime directory, a cgroup v2 subtree of its own where there is cgroup v2, and Go caches that stay, and runs the
# command there as that user. What it made for the run it removes; the account, its copy and its caches stay.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

[ $# -gt 0 ] || die "usage: as-user.sh COMMAND [ARG...]"

run_here() {
	if [ ! -w "${XDG_RUNTIME_DIR:-/nonexistent}" ]; then
		if [ -w "/run/user/$(id -u)" ]; then
			XDG_RUNTIME_DIR=/run/user/$(id -u)
			export XDG_RUNTIME_DIR
		else
			XDG_RUNTIME_DIR=$(mktemp -d "/tmp/xdg-$(id -u)-XXXXXX")
			export XDG_RUNTIME_DIR
			trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
			say "this session has no XDG_RUNTIME_DIR: using $XDG_RUNTIME_DIR for this run"
		fi
	fi
	cd "$REPO"
	"$@"
}

# make_user makes the account, with a login shell so that `su - coracle-test` serves to look around.
make_user() {
	id "$TEST_USER" >/dev/null 2>&1 && return 0
	say "making the account $TEST_USER, with its home in $TEST_HOME: coracle is run by ordinary users"
	useradd --create-home --home-dir "$TEST_HOME" --shell /bin/bash --user-group "$TEST_USER"
	chmod 0755 "$TEST_HOME"
}

# copy_checkout copies what git knows and what it would take, not what it ignores; .cache and bin of the copy stay.
copy_checkout() {
	local src=$TEST_HOME/src
	mkdir -p "$src"
	find "$src" -mindepth 1 -maxdepth 1 ! -name .cache ! -name bin -exec rm -rf {} +
	{
		git -c safe.directory="$REPO" -C "$REPO" ls-files -z --cached --others --exclude-standard 2>/dev/null ||
			(cd "$REPO" && find . \( -name .git -o -path ./.cache -o -path ./bin \) -prune -o -type f -print0)
	} | (
		cd "$REPO"
		# A file that git knows and that is deleted here is not there to be copied.
		while IFS= read -r -d '' f; do [ ! -e "$f" ] && [ ! -L "$f" ] || printf '%s\0' "$f"; done |
			tar --null --no-recursion -T - -cf -
	) | tar -C "$src" -xf - --no-same-owner
	chown -R "$TEST_USER:$TEST_USER" "$src"
}

# seed_caches spares the new user the download of what root has downloaded already.
seed_caches() {
	local from
	if [ ! -e "$TEST_HOME/go/pkg/mod/cache/download" ] && from=$("$REPO/scripts/go" env GOMODCACHE) && [ -d "$from/cache/download" ]; then
		mkdir -p "$TEST_HOME/go/pkg/mod/cache"
		cp -a "$from/cache/download" "$TEST_HOME/go/pkg/mod/cache/"
	fi
	if [ ! -e "$TEST_HOME/src/.cache" ]; then
		mkdir -p "$TEST_HOME/src/.cache"
		for from in "$REPO"/.cache/go-*; do [ ! -x "$from/bin/go" ] || cp -a "$from" "$TEST_HOME/src/.cache/"; done
	fi
	chown -R "$TEST_USER:$TEST_USER" "$TEST_HOME/src/.cache"
	[ ! -e "$TEST_HOME/go" ] || chown -R "$TEST_USER:$TEST_USER" "$TEST_HOME/go"
}

# delegate makes a cgroup v2 subtree that belongs to the user, as systemd does for a session with Delegate=yes, and
# prints its directory; prints nothing where there is no cgroup v2 or this root may not make one.
delegate() {
	local mount dir
	mount=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
	[ -n "$mount" ] || return 0
	# The controllers that containers need are enabled on the way; those that cannot be are left out. hugetlb is not asked
	# for: crun tries for two seconds to enable it where its parent has processes, as the keeper's tests have it.
	for c in cpu cpuset io memory pids; do
		{ echo "+$c" >"$mount/cgroup.subtree_control"; } 2>/dev/null || true
	done
	dir=$mount/$TEST_USER.$$
	mkdir -p "$dir/session" 2>/dev/null || return 0
	for c in cpu cpuset io memory pids; do
		{ echo "+$c" >"$dir/cgroup.subtree_control"; } 2>/dev/null || true
	done
	for c in "$dir" "$dir/session"; do
		chown "$TEST_USER:$TEST_USER" "$c" "$c/cgroup.procs" "$c/cgroup.subtree_control" "$c/cgroup.threads"
	done
	echo "$dir"
}

# release removes the subtree with whatever was left in it.
release() {
	[ -n "$1" ] && [ -d "$1" ] || return 0
	[ ! -e "$1/cgroup.kill" ] || echo 1 >"$1/cgroup.kill" 2>/dev/null || true
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
		[ -d "$1" ] || return 0
		sleep 0.2
	done
	say "the cgroup $1 could not be removed"
}

# quota makes a filesystem on which the user has a quota, for the tests of its end, and prints where: each package that has
# such tests has a directory of its name there. Prints nothing where this root may not mount, or the kernel has no btrfs.
quota() {
	local at=/var/lib/$TEST_USER.quota
	end_quota
	# By && and not by set -e, which holds nothing where a status is asked for: without the mount, what follows would be done
	# to the host's own filesystem.
	{
		mkdir -p "$at/mnt" && truncate -s 512M "$at/image" && mkfs.btrfs -q "$at/image" && mount -o loop "$at/image" "$at/mnt" &&
			btrfs quota enable "$at/mnt" && quota_of "$at/mnt/e2e" && quota_of "$at/mnt/images" && quota_of "$at/mnt/pod"
	} >/dev/null 2>&1 || {
		end_quota
		return 0
	}
	echo "$at/mnt"
}

quota_of() { btrfs subvolume create "$1" && btrfs qgroup limit 32M "$1" && chown "$TEST_USER:$TEST_USER" "$1"; }

# end_quota removes that filesystem, and one that a run has left which was killed.
end_quota() {
	local at=/var/lib/$TEST_USER.quota
	! mountpoint -q "$at/mnt" || umount "$at/mnt" || umount --lazy "$at/mnt"
	rm -rf --one-file-system "$at"
}

# environment prints the variables that the user's command gets: names and values, NUL between them.
environment() {
	local name
	printf '%s\0' HOME="$TEST_HOME" USER="$TEST_USER" LOGNAME="$TEST_USER" SHELL=/bin/bash LANG="${LANG:-C.UTF-8}" TERM="${TERM:-dumb}" \
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin \
		XDG_RUNTIME_DIR="$1" CORACLE_VERSION="$("$REPO/scripts/version.sh")"
	for name in GOPROXY GOSUMDB GONOSUMDB GONOPROXY GOPRIVATE GOINSECURE; do
		printf '%s=%s\0' $name "$("$REPO/scripts/go" env $name)"
	done
	# What names a proxy, limits the run or is meant for the Makefile goes through as it is.
	env -0 | grep -zE '^(https?_proxy|HTTPS?_PROXY|no_proxy|NO_PROXY|all_proxy|ALL_PROXY|SSL_CERT_(FILE|DIR)|NETRC|CI|CORACLE_E2E_[A-Z_]*|RUN)=' || true
}

run_as_test_user() {
	make_user
	"$REPO/scripts/setup.sh" --user "$TEST_USER"
	exec 9>"$TEST_HOME/.lock"
	flock -n 9 || { say "another run as $TEST_USER is going on: waiting for it"; flock 9; }
	copy_checkout
	seed_caches
	runtime=$(mktemp -d "/run/$TEST_USER.XXXXXX")
	chown "$TEST_USER:$TEST_USER" "$runtime"
	cgroup=$(delegate)
	trap 'release "$cgroup"; end_quota; rm -rf --one-file-system "$runtime"' EXIT
	CORACLE_E2E_QUOTA=$(quota)
	export CORACLE_E2E_QUOTA
	mapfile -d '' -t vars < <(environment "$runtime")
	# The shell that becomes the command moves itself first: a child is born in its parent's cgroup.
	(
		[ -z "$cgroup" ] || echo "$BASHPID" >"$cgroup/session/cgroup.procs"
		cd "$TEST_HOME/src"
		exec env -i "${vars[@]}" setpriv --reuid="$TEST_USER" --regid="$TEST_USER" --init-groups -- "$@" 9>&-
	)
}

if [ "$(id -u)" = 0 ]; then
	run_as_test_user "$@"
else
	run_here "$@"
fi
