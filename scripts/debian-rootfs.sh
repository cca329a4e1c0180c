#!/bin/bash
# Builds the root file system of a real distribution for the end-to-end tests: this machine's own Debian or Ubuntu
# release, minimal, with nginx and python3 from its packages (python3-django and perl for their many files). Kept in
# one tar file in /var/cache/coracle; does nothing where that is there.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

. /etc/os-release
tar=$IMAGES_DIR/rootfs-$VERSION_CODENAME-$(dpkg --print-architecture)-1.tar.zst
[ ! -s "$tar" ] || exit 0

# The mirror is the one that apt uses here; where apt does not tell, debootstrap knows the distribution's own.
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(REPO_URI) $(CODENAME) $(COMPONENT)' |
	awk -v suite="$VERSION_CODENAME" '$1 == "Packages" && $3 == suite && $4 == "main" { print $2; exit }')
case $ID in
debian) components=main ;;
*) components=main,universe ;;
esac
say "building a $ID $VERSION_CODENAME root file system for the tests with debootstrap, as root: $tar"
as_root mkdir -p "$IMAGES_DIR"
work=$(as_root mktemp -d "$IMAGES_DIR/build.XXXXXX")
trap 'as_root rm -rf --one-file-system "$work"' EXIT
as_root debootstrap --variant=minbase --components="$components" \
	--include=nginx-light,python3,python3-django,perl,tzdata,ca-certificates \
	"$VERSION_CODENAME" "$work/root" ${mirror:+"$mirror"} >"/tmp/debootstrap.$$.log" 2>&1 || {
	tail -n 20 "/tmp/debootstrap.$$.log" >&2
	die "debootstrap failed; its log is /tmp/debootstrap.$$.log"
}
rm -f "/tmp/debootstrap.$$.log"
# Downloaded packages are of no use to a test; device nodes cannot be made by an ordinary user and the runtime makes them.
as_root sh -c "rm -f '$work'/root/var/cache/apt/archives/*.deb '$work'/root/var/lib/apt/lists/*_*"
as_root tar --zstd -C "$work/root" --numeric-owner --xattrs --xattrs-include='security.capability' --exclude='./dev/*' -cf "$work/rootfs.tar.zst" .
as_root chmod 0644 "$work/rootfs.tar.zst"
as_root mv "$work/rootfs.tar.zst" "$tar"
