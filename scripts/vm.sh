#!/bin/bash
# Runs a command as an ordinary user in a virtual machine that has all of cgroup v2, systemd and D-Bus:
# `scripts/vm.sh [--mode MODE] [--with PATH]... [--env NAME=VALUE]... [--log DIR] [--timeout SECONDS] -- COMMAND [ARG...]`.
#
# The command's lines are printed as they come, its exit code is the script's, and DIR gets the guest's journal, the
# console and whatever the command put into $VM_LOGS. Each PATH is copied into the guest's /payload. The user may use
# sudo. The disk of scripts/vm-image.sh is not changed. What MODE the user's session is of:
#
#   full     a login session with a user systemd to which all controllers are delegated (the default)
#   memory   the same as systemd before 252 has it without a drop-in: memory and pids only (252 adds cpu)
#   plain    no systemd of the user's, until one is asked for; the command is a process of a system service that
#            delegates nothing
#   service  no user systemd; the command is a process of a system service with Delegate=yes
#
# KVM is used where it boots the guest, else QEMU's emulation: 14 times slower at computing, 30 times at fork and exec.
# CORACLE_VM_ACCEL=tcg or kvm skips the attempt. The guest tells every five seconds that it lives: an emulated machine that
# stands still for two minutes is ended, where its processors stood is kept in DIR/stood-still.log, and it is booted once more.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

pid='' mode=full log='' limit=3000 with=() vars=()
while [ $# -gt 0 ]; do
	case $1 in
	--mode) mode=$2 && shift ;;
	--with) with+=("$2") && shift ;;
	--env) vars+=("$2") && shift ;;
	--log) log=$2 && shift ;;
	--timeout) limit=$2 && shift ;;
	--) shift && break ;;
	*) die "vm.sh: unknown option $1; see the head of the script" ;;
	esac
	shift
done
[ $# -gt 0 ] || die "vm.sh: no command"
case $mode in full | memory | plain | service) ;; *) die "vm.sh: unknown mode $mode" ;; esac

image=$("$REPO/scripts/vm-image.sh" --print)
[ -s "$image/root.img" ] || die "the test VM is not built; run: scripts/setup.sh --vm"
work=$(mktemp -d "${TMPDIR:-/var/tmp}/coracle-vm.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=${log:-$work/log}
mkdir -p "$log"
rm -f "$log/exit-code" "$log"/stood-still*.log # of an earlier run

# The payload is a file system of its own, made from a directory.
mkdir "$work/payload"
for path in "${with[@]}"; do cp -aH "$path" "$work/payload/"; done
printf '%s\0' "$@" >"$work/payload/.command"
: >"$work/payload/.environment"
[ ${#vars[@]} -eq 0 ] || printf '%s\0' "${vars[@]}" >"$work/payload/.environment"
size=$(($(du -sm "$work/payload" | cut -f1) * 11 / 10 + 16))
mke2fs -q -t ext4 -O ^has_journal -d "$work/payload" "$work/payload.img" "${size}M" >/dev/null
rm -rf "$work/payload"
truncate -s 256M "$work/logs.img"
mkfifo "$work/monitor.in" "$work/monitor.out"

# boot runs the machine to its end with the accelerator: kvm or tcg. Emulated, an older processor is what works: with
# QEMU 7.2's `-cpu max,-svm` the guest's C library fails in readlink(2), and with SVM the guest spends its boot on KVM.
boot() {
	local accel=$1 cpu=Nehalem,-svm
	[ "$accel" != kvm ] || cpu=host
	[ "$accel" != tcg ] || accel=tcg,thread=multi,tb-size=1024
	exec nice -n "${CORACLE_VM_NICE:-0}" qemu-system-x86_64 -accel "$accel" -cpu $cpu -smp 2 -m "${CORACLE_VM_MEMORY:-2048}" -nodefaults -display none -no-reboot \
		-kernel "$image/vmlinuz" -initrd "$image/initrd" \
		-append "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=1 panic=-1 mitigations=off module_blacklist=ata_piix,aesni_intel,ghash_clmulni_intel,powernow_k8,acpi_cpufreq,psmouse coracle.mode=$mode" \
		-drive "file=$image/root.img,format=raw,if=virtio,snapshot=on" \
		-drive "file=$work/payload.img,format=raw,if=virtio,readonly=on" \
		-drive "file=$work/logs.img,format=raw,if=virtio" \
		-device virtio-rng-pci -device virtio-serial-pci \
		-chardev "file,id=out,path=$log/output.log" -device virtserialport,chardev=out,name=out \
		-chardev "file,id=alive,path=$log/alive.log" -device virtserialport,chardev=alive,name=alive \
		-chardev "pipe,id=monitor,path=$work/monitor" -mon monitor \
		-serial "file:$log/console.log" </dev/null
}

# stands_still tells whether the guest, which has lived, has not for 240 looks, which are two minutes. They are counted, since a
# host that sleeps has a clock that goes on. What the guest has written is kept in signs, and how often that was all in looks.
stands_still() {
	local now
	now=$(stat -c %s "$log/alive.log" 2>/dev/null) || now=0
	looks=$((looks + 1))
	[ "$now" = "$signs" ] || { signs=$now looks=0; }
	[ "$signs" -gt 0 ] && [ "$looks" -gt 240 ]
}

# attempt boots with the accelerator; it returns 1 where the guest shows no sign of life within a minute and a half, and
# 75, sysexits' "try again", where it stops to live.
attempt() {
	local printer deadline=$((SECONDS + limit)) alive=$((SECONDS + 90)) signs=0 looks=0
	: >"$log/output.log"
	: >"$log/alive.log"
	boot "$1" >"$log/qemu.log" 2>&1 &
	pid=$!
	tail -n +1 -f --pid=$pid "$log/output.log" &
	printer=$!
	# However this script ends, the machine does.
	trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; rm -rf "$work"' EXIT
	while kill -0 $pid 2>/dev/null; do
		if [ "$1" = kvm ] && [ $SECONDS -gt $alive ] && [ ! -s "$log/output.log" ]; then
			kill $pid
			wait $pid || true
			return 1
		fi
		if stands_still; then
			say "the guest stands still: after $signs bytes of signs of life none for two minutes"
			timeout 3 sh -c 'echo info registers -a >"$0"' "$work/monitor.in" || true
			timeout 3 cat "$work/monitor.out" >"$log/stood-still.log" || true
			kill -KILL $pid
			wait $pid || true
			return 75
		fi
		[ $SECONDS -lt $deadline ] || {
			kill $pid
			wait $pid || true
			die "the VM did not end within $limit seconds; its console is $log/console.log"
		}
		sleep 0.5
	done
	wait $pid || true
	wait $printer || true
	[ "$1" != kvm ] || [ -s "$log/output.log" ]
}

export TMPDIR=$work
accel=${CORACLE_VM_ACCEL:-}
if [ -z "$accel" ]; then
	accel=tcg
	[ ! -w /dev/kvm ] || accel=kvm
fi
began=$SECONDS
ended=0
attempt "$accel" || ended=$?
if [ $ended = 1 ]; then
	say "the guest does not boot under KVM here: emulating"
	ended=0
	attempt tcg || ended=$?
fi
if [ $ended = 75 ]; then
	say "booting it once more"
	mv "$log/console.log" "$log/stood-still-console.log"
	attempt tcg || die "the VM stood still twice"
fi
tar -xf "$work/logs.img" -C "$log" --no-same-owner 2>/dev/null || true
code=$(cat "$log/exit-code" 2>/dev/null) || true
[ "$code" = 0 ] || tail -n 40 "$log/console.log" "$log/qemu.log" >&2
[ -n "$code" ] || die "the VM ended without a result"
say "VM, mode $mode: exit code $code after $((SECONDS - began)) s"
exit "$code"
