# shellcheck shell=bash
# Sourced by the other scripts: where things are, and how they speak.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export REPO=$repo

# images_dir holds what root builds once for the tests and every user may read.
export IMAGES_DIR=/var/cache/coracle

# The account that the tests and the demo drop to when they are started as root. CORACLE_TEST_USER names another one, so
# that two checkouts can be tested side by side.
export TEST_USER=${CORACLE_TEST_USER:-coracle-test}
export TEST_HOME=/var/lib/$TEST_USER

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# as_root runs a command as root: as is, or through sudo.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		die "this needs root and there is no sudo here; as root, run: $*"
	fi
}

# find_program NAME FALLBACK prints where a program is: as named where that is a path, on PATH, else the fallback.
find_program() {
	command -v "$1" && return 0
	[ -x "$2" ] && echo "$2"
}
