#!/bin/sh
# Prints the linker's flag for a static coracle-keeper, or nothing where this machine lacks libc.a or libseccomp.a (Debian's
# libc6-dev and libseccomp-dev have them). The keeper's program is executed anew for each process of a container: without the dynamic
# linker that takes 70 page faults and 0.3 ms of CPU time less each. It is the same program otherwise.
dir=$(mktemp -d) || exit 0
trap 'rm -rf "$dir"' EXIT
echo 'int main(void) { return 0; }' | ${CC:-cc} -x c - -static -lseccomp -o "$dir/probe" 2>/dev/null && echo -extldflags=-static
exit 0
