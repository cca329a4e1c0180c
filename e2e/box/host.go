package box

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// serveHost is PID 1: it shapes the machine, runs the test as the ordinary user and reaps what loses its parent.
// It ends the process with the test's exit code; it returns only on error.
func serveHost() error {
	if path := os.Getenv(removeEnv); path != "" {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		os.Exit(0)
	}
	var h Host
	if err := json.Unmarshal([]byte(os.Getenv(hostEnv)), &h); err != nil {
		return err
	}
	uid, err1 := strconv.Atoi(os.Getenv("CORACLE_BOX_UID"))
	gid, err2 := strconv.Atoi(os.Getenv("CORACLE_BOX_GID"))
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := shape(h, uid); err != nil {
		return err
	}
	code, err := runAs(uid, gid)
	if err != nil {
		return err
	}
	os.Exit(code)
	return nil
}

func shape(h Host, uid int) error {
	// The ids are read first: afterwards the files say what they say in the box.
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Sethostname([]byte("box")); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	steps := []func() error{addresses, func() error { return files(h, u.Username) }}
	if len(h.Names) > 0 {
		steps = append(steps, func() error { return serveNames(h) })
	}
	if h.NoTun {
		steps = append(steps, func() error { return unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, "mode=0755") })
	}
	if h.NoUserns {
		steps = append(steps, func() error { return os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0) })
	}
	if h.NoCgroup {
		steps = append(steps, readOnlyCgroups)
	}
	if h.SmallTmp != "" {
		steps = append(steps, func() error { return unix.Mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777,"+h.SmallTmp) })
	}
	if h.Tmp != "" {
		steps = append(steps, func() error { return unix.Mount(h.Tmp, "/tmp", "", unix.MS_BIND, "") })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// readOnlyCgroups leaves the flags alone that a mount brought along from outside: the kernel has locked them.
func readOnlyCgroups() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != "cgroup2" {
			continue
		}
		flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY)
		for option := range strings.SplitSeq(f[3], ",") {
			flags |= map[string]uintptr{"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
				"noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME}[option]
		}
		if err := unix.Mount("", f[1], "", flags, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", f[1], err)
		}
	}
	return nil
}

// addresses brings loopback up and puts Address on it: an address that is not 127.0.0.1 needs no further device.
func addresses() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	addr, err := netlink.ParseAddr(Address + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(lo, addr); err != nil {
		return fmt.Errorf("add address %s: %w", Address, err)
	}
	return nil
}

// files gives the box its own configuration files, and newuidmap and newgidmap that belong to its uid 0: the kernel
// ignores the set-user-ID bit of a program whose owner is not mapped.
func files(h Host, name string) error {
	const dir = "/mnt"
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	contents := map[string]string{}
	for _, f := range []string{"/etc/subuid", "/etc/subgid"} {
		first, count, err := mapped(f)
		if err != nil {
			return err
		}
		contents[f] = fmt.Sprintf("%s:%d:%d\n", name, first, count)
		if h.NoSubIDs {
			contents[f] = ""
		}
	}
	if len(h.Names) > 0 {
		contents["/etc/resolv.conf"] = "nameserver " + nameServer + "\n"
		if h.Search != "" {
			contents["/etc/resolv.conf"] += "search " + h.Search + "\n"
		}
	}
	for target, text := range contents {
		if err := cover(filepath.Join(dir, filepath.Base(target)), target, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		target, err := exec.LookPath(tool)
		if err != nil {
			return err
		}
		raw, err := os.ReadFile(target)
		if err != nil {
			return err
		}
		if err := cover(filepath.Join(dir, tool), target, raw, 0o755|os.ModeSetuid); err != nil {
			return err
		}
	}
	return nil
}

// mapped is the range of subordinate ids in the box: the largest of the id map, which writeMaps put there.
func mapped(file string) (first, count int, err error) {
	m := map[string]string{"/etc/subuid": "/proc/self/uid_map", "/etc/subgid": "/proc/self/gid_map"}[file]
	f, err := os.Open(m)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	for {
		var in, out, n int
		if _, err := fmt.Fscan(f, &in, &out, &n); err != nil {
			break
		}
		if n > count {
			first, count = in, n
		}
	}
	if count < 2 {
		return 0, 0, fmt.Errorf("%s has no range of subordinate ids", m)
	}
	return first, count, nil
}

// cover writes a file and binds it over target.
func cover(file, target string, content []byte, mode os.FileMode) error {
	if err := os.WriteFile(file, content, 0o600); err != nil {
		return err
	}
	if err := os.Chmod(file, mode); err != nil {
		return err
	}
	if err := unix.Mount(file, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind over %s: %w", target, err)
	}
	return nil
}

// runAs executes this program again as the ordinary user and returns its exit code. It waits for every child, since
// PID 1 inherits orphans; that is why no os/exec is used, which waits by itself.
func runAs(uid, gid int) (int, error) {
	env := with(os.Environ(), stageEnv, inside)
	pid, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env: env, Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), Groups: []uint32{}}},
	})
	if err != nil {
		return 0, fmt.Errorf("start the test in the box: %w", err)
	}
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got == pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case got == pid:
			return status.ExitStatus(), nil
		}
	}
}
