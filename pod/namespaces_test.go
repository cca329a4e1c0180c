package pod

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/coracle-cri/coracle/netslirp"
)

// TestNamespaces asks the kernel what is inside of the pinned namespaces.
func TestNamespaces(t *testing.T) {
	dir := t.TempDir()
	pin := func(kind string) string { return filepath.Join(dir, "ns", kind) }
	set := nsSet{
		kinds:    []nsKind{{"net", unix.CLONE_NEWNET, pin("net")}, {"uts", unix.CLONE_NEWUTS, pin("uts")}, {"ipc", unix.CLONE_NEWIPC, pin("ipc")}},
		hostname: "inside",
		sysctls: map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shmmax": "12345", "kernel.msgmax": "4096",
			"kernel.sem": "250\t32000\t32\t64", "fs.mqueue.msg_max": "7", "net/ipv4/conf/default/rp_filter": "2",
		},
	}
	before := readSysctls(t, set.sysctls)
	if err := set.make(); err != nil {
		t.Fatal(err)
	}
	err := netslirp.OnOwnThread(func() error {
		for _, k := range set.kinds {
			if !pinned(k.pin) {
				t.Errorf("%s is not pinned", k.name)
			}
			fd, err := unix.Open(k.pin, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := unix.Setns(fd, k.flag); err != nil {
				return err
			}
			unix.Close(fd)
		}
		inside := readSysctls(t, set.sysctls)
		for name, want := range set.sysctls {
			if inside[name] != want {
				t.Errorf("%s inside: %q, want %q", name, inside[name], want)
			}
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil || unix.ByteSliceToString(u.Nodename[:]) != "inside" {
			t.Errorf("hostname %q %v", unix.ByteSliceToString(u.Nodename[:]), err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if after := readSysctls(t, set.sysctls); after["kernel.shmmax"] != before["kernel.shmmax"] || after["kernel.shmmax"] == "12345" {
		t.Errorf("the thread leaked: %v", after)
	}
	if host, _ := os.Hostname(); host == "inside" {
		t.Error("the hostname leaked")
	}
	for range 2 {
		if err := unmountPodDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	if entries, _ := os.ReadDir(filepath.Join(dir, "ns")); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}

// TestKubernetesSafeSysctls: each of those that the kubelet admits without being told to.
func TestKubernetesSafeSysctls(t *testing.T) {
	sysctls := map[string]string{
		"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "20000\t30000", "net.ipv4.tcp_syncookies": "0",
		"net.ipv4.ping_group_range": "0\t0", "net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ip_local_reserved_ports": "8080,9000-9010",
		"net.ipv4.tcp_keepalive_time": "600", "net.ipv4.tcp_fin_timeout": "30", "net.ipv4.tcp_keepalive_intvl": "60",
		"net.ipv4.tcp_keepalive_probes": "5", "net.ipv4.tcp_rmem": "4096\t87380\t1048576", "net.ipv4.tcp_wmem": "4096\t16384\t1048576",
	}
	dir := t.TempDir()
	set := nsSet{sysctls: sysctls, hostname: "p", kinds: []nsKind{
		{"net", unix.CLONE_NEWNET, filepath.Join(dir, "ns/net")}, {"ipc", unix.CLONE_NEWIPC, filepath.Join(dir, "ns/ipc")},
	}}
	if err := validateSysctls(sysctls, nil); err != nil {
		t.Fatal(err)
	}
	if err := set.make(); err != nil {
		t.Fatal(err)
	}
	err := netslirp.OnOwnThread(func() error {
		for _, k := range set.kinds {
			fd, err := unix.Open(k.pin, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := errors.Join(unix.Setns(fd, k.flag), unix.Close(fd)); err != nil {
				return err
			}
		}
		for name, got := range readSysctls(t, sysctls) {
			if got != sysctls[name] {
				t.Errorf("%s: %q, want %q", name, got, sysctls[name])
			}
		}
		return nil
	})
	if err := errors.Join(err, unmountPodDir(dir)); err != nil {
		t.Fatal(err)
	}
}

// TestSysctlsThatTheKernelRefuses: the answer says whose they are, and that the request, not the runtime, is to change.
func TestSysctlsThatTheKernelRefuses(t *testing.T) {
	for name, c := range map[string]struct{ value, says string }{
		"net.ipv4.tcp_mem":                          {"1 2 3", "whole machine"},
		"net.ipv4.conf.eth7.rp_filter":              {"1", "none of this name"},
		"net.ipv4.tcp_available_congestion_control": {"reno", "root"},
		"net.ipv4.tcp_fin_timeout":                  {"soon", `"soon"`},
	} {
		err := netslirp.OnOwnThread(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			return writeSysctls(map[string]string{name: c.value})
		})
		wantCode(t, grpcError(err), codes.InvalidArgument)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v does not say %q", name, err, c.says)
		}
	}
	wantCode(t, grpcError(whyNoSysctl("net.x", unix.EROFS)), codes.FailedPrecondition)
}

func readSysctls(t *testing.T, names map[string]string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for name := range names {
		raw, err := os.ReadFile(sysctlPath(name))
		if err != nil {
			t.Error(err)
		}
		out[name] = strings.TrimSpace(string(raw))
	}
	return out
}

func TestSysctlNames(t *testing.T) {
	for in, want := range map[string]string{
		"net.ipv4.ip_forward":              "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/ip_forward":              "/proc/sys/net/ipv4/ip_forward",
		"net/ipv4/conf/eth0.100/rp_filter": "/proc/sys/net/ipv4/conf/eth0.100/rp_filter",
		"kernel.shmmax":                    "/proc/sys/kernel/shmmax",
	} {
		if got := sysctlPath(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	early, late := splitSysctls(map[string]string{
		"net.ipv4.conf.eth0.rp_filter": "1", "net.ipv4.conf.all.rp_filter": "1", "net.ipv4.neigh.eth0.gc_stale_time": "1", "net.core.somaxconn": "1",
	})
	if len(early) != 2 || len(late) != 2 || late["net.ipv4.conf.eth0.rp_filter"] == "" {
		t.Errorf("early %v, late %v", early, late)
	}
}

// TestPinPID refuses a process that is not the one meant.
func TestPinPID(t *testing.T) {
	pin := filepath.Join(t.TempDir(), "pid")
	start, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := pinPID(os.Getpid(), start+1, pin); err == nil || pinned(pin) {
		t.Errorf("pinned another process: %v", err)
	}
	if err := pinPID(os.Getpid(), start, pin); err != nil || !pinned(pin) {
		t.Errorf("pin: %v", err)
	}
	if err := unpin(pin); err != nil {
		t.Error(err)
	}
}
