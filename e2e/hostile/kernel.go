package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// kernel are the ways that lead through the kernel's own files and calls.
func kernel() []attempt {
	var out []attempt
	// What is not of any namespace: a value there is the host's.
	for _, path := range []string{"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/randomize_va_space",
		"/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max", "/proc/sys/net/core/rmem_max", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity",
		"/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state", "/sys/kernel/uevent_helper"} {
		out = append(out, attempt{"write " + path, func() (string, error) { return openOnly(path) }})
	}
	for _, path := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats", "/dev/kmsg", "/dev/mem"} {
		out = append(out, attempt{"read " + path, func() (string, error) { return read(path) }})
	}
	for _, path := range []string{"/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"} {
		out = append(out, attempt{"list " + path, func() (string, error) { return list(path) }})
	}
	return append(out,
		attempt{"write own sysctl", func() (string, error) { return openOnly("/proc/sys/kernel/shmmax") }},
		attempt{"write /sys", writeSys},
		attempt{"write own cgroup", func() (string, error) { return openOnly("/sys/fs/cgroup/cgroup.procs") }},
		attempt{"mount tmpfs", func() (string, error) { return mount("tmpfs") }},
		attempt{"mount proc", func() (string, error) { return mount("proc") }},
		attempt{"mount sysfs", func() (string, error) { return mount("sysfs") }},
		attempt{"mount cgroup", func() (string, error) { return mount("cgroup") }},
		attempt{"uncover /proc/keys", uncover},
		attempt{"make block device", blockDevice},
		attempt{"load module", func() (string, error) { return "", expect(unix.FinitModule(-1, "", 0), unix.EBADF) }},
		attempt{"raw sockets", rawSocket},
		attempt{"nested user namespace", func() (string, error) { return nested("true") }},
		attempt{"nested user namespace: mount proc", func() (string, error) { return nested("proc") }},
		attempt{"nested user namespace: mount tmpfs", func() (string, error) { return nested("tmpfs") }},
	)
}

// writeSys takes the first file of a network device's that root may write.
func writeSys() (string, error) {
	return openOnly("/sys/class/net/lo/tx_queue_len")
}

// mount mounts in a mount namespace of its own, which ends with the thread.
func mount(kind string) (string, error) {
	return "", onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		return unix.Mount(kind, "/tmp", kind, 0, "")
	})
}

// uncover takes away what is mounted over a masked file.
func uncover() (string, error) {
	return "", onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		return unix.Unmount("/proc/keys", unix.MNT_DETACH)
	})
}

func blockDevice() (string, error) {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	return "", unix.Mknod(dir+"/sda", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0)))
}

func rawSocket() (string, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err == nil {
		unix.Close(fd)
	}
	return "", err
}

// expect: a call that is made in vain got as far as its arguments where it says what is wrong with them.
func expect(got, want error) error {
	if errors.Is(got, want) {
		return nil
	}
	return got
}

const nestedEnv = "HOSTILE_NESTED"

// nested runs this program again as root of a user namespace of its own.
func nested(what string) (string, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), nestedEnv+"="+what)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return "", nil
}

func init() {
	kind := os.Getenv(nestedEnv)
	if kind == "" {
		return
	}
	var err error
	if kind != "true" {
		err = unix.Mount(kind, "/tmp", kind, 0, "")
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}
