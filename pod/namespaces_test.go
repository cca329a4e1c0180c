package pod

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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
	err := onOwnThread(func() error {
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
