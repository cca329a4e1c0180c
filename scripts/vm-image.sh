#!/bin/bash
# Builds the test VM's disk: this machine's own Debian or Ubuntu release with systemd, its kernel for virtual machines and
# what a node needs. Kept in /var/cache/coracle/vm-…; does nothing where that is there. Nothing is mounted: mke2fs
# fills the file system from a directory. Root is needed by debootstrap, which makes files of other owners.
#
# The guest's side of scripts/vm.sh is here: a generator that makes the mode of the kernel's command line true, and a
# service that runs the command as the ordinary user "tester", saves the logs and powers off.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

. /etc/os-release
out=$IMAGES_DIR/vm-$VERSION_CODENAME-$(dpkg --print-architecture)-$(sha256sum "$0" | cut -c1-8)
[ "${1:-}" != --print ] || { echo "$out" && exit 0; }
[ ! -s "$out/root.img" ] || exit 0

case $ID in
debian) components=main kernel=linux-image-cloud-$(dpkg --print-architecture) ;;
*) components=main,universe kernel=linux-image-virtual ;;
esac
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(REPO_URI) $(CODENAME) $(COMPONENT)' |
	awk -v suite="$VERSION_CODENAME" '$1 == "Packages" && $3 == suite && $4 == "main" { print $2; exit }')
# systemd with a user session and its bus; what a node and the tests run; crun for the OCI handlers; sudo for the commands
# that coracle tells its user to run.
packages=systemd,systemd-sysv,libpam-systemd,dbus,dbus-user-session,udev,kmod,initramfs-tools,$kernel
packages=$packages,uidmap,slirp4netns,iproute2,util-linux,procps,crun,busybox-static,ca-certificates,nftables,netbase,iptables,make,curl,sudo

# write makes a file of the guest from standard input: PATH MODE.
write() {
	mkdir -p "$(dirname "$root$1")"
	cat >"$root$1"
	chmod "$2" "$root$1"
}

configure() {
	local root=$1 unit
	echo coracle-vm >"$root/etc/hostname"
	echo '127.0.0.1 localhost coracle-vm' >"$root/etc/hosts"
	echo '/dev/vda / ext4 defaults 0 0' >"$root/etc/fstab"
	chroot "$root" useradd --uid 1000 --create-home --shell /bin/bash tester
	grep -q '^tester:' "$root/etc/subuid" || echo 'tester:100000:65536' | tee -a "$root/etc/subuid" >>"$root/etc/subgid"
	mkdir -p "$root/var/lib/systemd/linger" "$root/payload"
	echo 'tester ALL=(ALL) NOPASSWD: ALL' | write /etc/sudoers.d/tester 0440
	# Nothing that takes time, which is dear in an emulated machine.
	for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
		getty@tty1.service serial-getty@ttyS0.service systemd-timesyncd.service systemd-random-seed.service systemd-update-utmp.service \
		systemd-pstore.service logrotate.timer man-db.timer motd-news.timer; do
		ln -sf /dev/null "$root/etc/systemd/system/$unit"
	done
	printf '%s\n' overlay tun bridge veth nf_tables nft_chain_nat nft_masq nft_redir nft_fib nft_reject_inet | write /etc/modules-load.d/vm.conf 0644
	printf 'kernel.printk = 4 4 1 7\n' | write /etc/sysctl.d/90-vm.conf 0644

	write /etc/systemd/system-generators/coracle-vm 0755 <<-'END'
		#!/bin/sh
		# Makes the mode true that the kernel's command line names: coracle.mode=MODE (see scripts/vm.sh).
		mode=full
		for word in $(cat /proc/cmdline); do case $word in coracle.mode=*) mode=${word#*=} ;; esac; done
		service() { mkdir -p "$1/coracle-vm.service.d" && printf '[Service]\n%s\n' "$2" >"$1/coracle-vm.service.d/mode.conf"; }
		session() {
			mkdir -p "$1/user@.service.d" "$1/coracle-vm.service.d"
			printf '[Service]\nDelegate=\nDelegate=%s\n' "$2" >"$1/user@.service.d/delegate.conf"
			printf '[Unit]\nWants=user@1000.service\n' >"$1/coracle-vm.service.d/mode.conf"
		}
		case $mode in
		full) session "$1" 'cpu cpuset io memory pids' ;;
		memory) session "$1" 'memory pids' ;;
		plain) service "$1" 'PAMName=' ;;
		service) ln -sf /dev/null "$2/user@.service" && service "$1" "$(printf 'PAMName=\nDelegate=yes')" ;;
		esac
	END
	# A session as sshd would open one: pam_systemd puts its process into a session scope of logind's.
	write /etc/pam.d/coracle-vm 0644 <<-'END'
		auth     required pam_permit.so
		account  required pam_permit.so
		session  required pam_limits.so
		@include common-session
	END
	write /etc/systemd/system/coracle-vm.service 0644 <<-'END'
		[Unit]
		Description=The command of the test VM
		Requires=coracle-vm-begin.service
		Wants=coracle-vm-alive.service
		After=coracle-vm-begin.service user@1000.service multi-user.target systemd-user-sessions.service
		OnSuccess=coracle-vm-finish.service
		OnFailure=coracle-vm-finish.service
		[Service]
		User=tester
		PAMName=coracle-vm
		WorkingDirectory=/home/tester
		ExecStart=/usr/local/bin/vm-command
		StandardOutput=file:/dev/virtio-ports/out
		StandardError=inherit
		TimeoutStartSec=infinity
		LimitNOFILE=65536
		[Install]
		WantedBy=graphical.target
	END
	write /etc/systemd/system/coracle-vm-begin.service 0644 <<-'END'
		[Unit]
		Description=The begin of the test VM
		[Service]
		Type=oneshot
		TimeoutStartSec=infinity
		ExecStart=/usr/local/sbin/vm-begin
	END
	write /etc/systemd/system/coracle-vm-finish.service 0644 <<-'END'
		[Unit]
		Description=The end of the test VM
		[Service]
		Type=oneshot
		ExecStart=/usr/local/sbin/vm-finish
	END
	# What tells a command that says nothing from a machine that stands still.
	write /etc/systemd/system/coracle-vm-alive.service 0644 <<-'END'
		[Unit]
		Description=The sign of life of the test VM
		Requires=coracle-vm-begin.service
		After=coracle-vm-begin.service
		[Service]
		ExecStart=/bin/sh -c 'while :; do cut -d" " -f1 /proc/uptime; sleep 5; done'
		StandardOutput=file:/dev/virtio-ports/alive
		Restart=always
		OOMScoreAdjust=-1000
	END
	mkdir -p "$root/etc/systemd/system/graphical.target.wants"
	ln -sf /etc/systemd/system/coracle-vm.service "$root/etc/systemd/system/graphical.target.wants/coracle-vm.service"
	write /usr/local/sbin/vm-begin 0755 <<-'END'
		#!/bin/sh -e
		# udev makes the devices when it comes to them.
		until [ -c /dev/virtio-ports/out ] && [ -c /dev/virtio-ports/alive ] && [ -b /dev/vdb ] && [ -c /dev/net/tun ]; do sleep 0.2; done
		mount -o ro /dev/vdb /payload
		mkdir -p /var/log/vm && chown tester: /var/log/vm
		chmod 0666 /dev/net/tun
		# The user whose systemd is there has it without being logged in, too.
		for word in $(cat /proc/cmdline); do case $word in coracle.mode=full | coracle.mode=memory) touch /var/lib/systemd/linger/tester ;; esac; done
		echo "vm: $(uname -r), up for $(cut -d' ' -f1 /proc/uptime) s" >/dev/virtio-ports/out
	END
	write /usr/local/bin/vm-command 0755 <<-'END'
		#!/bin/bash
		# A unit with Delegate=yes: this shell and what it runs go into a leaf, so that controllers can be enabled beside it.
		unit=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
		[ ! -w "$unit/cgroup.procs" ] || { mkdir "$unit/session" && echo $$ >"$unit/session/cgroup.procs"; }
		# The environment and the words of the command, each ended by NUL.
		mapfile -d '' -t vars </payload/.environment
		mapfile -d '' -t words </payload/.command
		env VM_LOGS=/var/log/vm LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${vars[@]}" "${words[@]}"
		echo $? >/var/log/vm/exit-code
	END
	# The logs go to the third disk as a tar file: no file system that the host would have to mount.
	write /usr/local/sbin/vm-finish 0755 <<-'END'
		#!/bin/sh
		mkdir -p /var/log/vm
		cd /var/log/vm || exit
		journalctl -b --no-pager >journal.txt 2>&1
		systemd-cgls --no-pager >cgroups.txt 2>&1
		ps -eo pid,ppid,user,stat,cgroup,args >processes.txt
		tar -cf /dev/vdc . 2>/dev/null
		sync
		echo o >/proc/sysrq-trigger
	END
	write /etc/initramfs-tools/conf.d/vm 0644 <<<'MODULES=list'
	printf '%s\n' virtio_pci virtio_blk ext4 >>"$root/etc/initramfs-tools/modules"
	chroot "$root" update-initramfs -u >/dev/null 2>&1
	rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*_* "$root"/usr/share/{doc,man,locale}
}

build() {
	work=$(mktemp -d "$IMAGES_DIR/build.XXXXXX")
	trap 'rm -rf --one-file-system "$work"' EXIT
	debootstrap --variant=minbase --components="$components" --include="$packages" "$VERSION_CODENAME" "$work/root" ${mirror:+"$mirror"} >"$work/log" 2>&1 || {
		tail -n 20 "$work/log" >&2
		die "debootstrap failed"
	}
	configure "$work/root"
	mkdir "$work/vm"
	cp "$work"/root/boot/vmlinuz-* "$work/vm/vmlinuz"
	cp "$work"/root/boot/initrd.img-* "$work/vm/initrd"
	mke2fs -q -t ext4 -L root -d "$work/root" "$work/vm/root.img" 4G >/dev/null
	chmod 0755 "$work/vm"
	chmod 0644 "$work"/vm/*
	rm -rf "$out"
	mv "$work/vm" "$out"
}

if [ "$(id -u)" != 0 ]; then
	exec sudo "$0" "$@"
fi
say "building the test VM of $ID $VERSION_CODENAME with debootstrap, as root: $out"
mkdir -p "$IMAGES_DIR"
build
