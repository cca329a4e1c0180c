package netslirp

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tapFilter keeps from a user-mode network what is for 127.0.0.0/8 or 0.0.0.0/8, as it passes from the TAP device to the
// program. slirp4netns would connect to what listens on the host's loopback there, whatever --disable-host-loopback says,
// which is about its gateway's address alone. No routing of the node's brings such a packet to it, but a pod in the node's
// network can: with CAP_NET_RAW as a frame of its own, and without by a socket that is bound to the device.
//
// The filter is the device's own, behind every queue, hook and rule that a pod with capabilities could go around or change.
// Only who holds the program's descriptor can set it. The kernel keeps the address of what was set and looks there again, in
// whichever process opens the device next, so that it is taken off first (close).
type tapFilter struct{ tap int } // a descriptor; os.File would make what it shares with the program blocking

const tunDevice = "/dev/net/tun"

// filterTap takes the program's descriptor of its TAP device, once it has one, which a parent of the same user may.
func filterTap(pid int) (*tapFilter, error) {
	tap, err := tapOf(pid)
	if err != nil {
		return nil, fmt.Errorf("find the TAP device of process %d: %w", pid, err)
	}
	f := &tapFilter{tap: tap}
	if err := f.set(unix.TUNATTACHFILTER); err != nil {
		return nil, fmt.Errorf("filter the TAP device of process %d: %w", pid, errors.Join(err, unix.Close(tap)))
	}
	return f, nil
}

func (f *tapFilter) close() error {
	return errors.Join(f.set(unix.TUNDETACHFILTER), unix.Close(f.tap))
}

// set attaches the program, or detaches whatever there is.
func (f *tapFilter) set(request uintptr) error {
	const (
		load   = unix.BPF_LD | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		answer = unix.BPF_RET | unix.BPF_K
		all    = 0xffffffff
		ipAt   = 14
	)
	program := []unix.SockFilter{
		{Code: load | unix.BPF_H, K: etherTypeAt},
		{Code: equal, K: unix.ETH_P_IP, Jf: 3},
		{Code: load | unix.BPF_B, K: ipAt + ipv4.daddr()}, // the first byte of the destination
		{Code: equal, K: 127, Jt: 2},
		{Code: equal, K: 0, Jt: 1},
		{Code: answer, K: all},
		{Code: answer, K: 0},
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.tap), request, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return errno
	}
	return nil
}

// CheckTAPFilter tells whether this host lets a node filter its TAP device, by a child of the caller's own that it starts and
// ends. ErrKept comes with the cause and what mends it; any other error is that it could not be told.
func CheckTAPFilter() error {
	child := exec.Command("cat")
	input, err := child.StdinPipe() // it waits for what does not come
	if err != nil {
		return err
	}
	defer input.Close()
	if err := child.Start(); err != nil {
		return err
	}
	fd, err := descriptorOf(child.Process.Pid, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	_, _ = child.Process.Kill(), child.Wait() // its end is no news
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOSYS): // what forbids answers so
		return err
	}
	raw, _ := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope") // none without Yama
	switch scope := string(bytes.TrimSpace(raw)); scope {
	case "2":
		return fmt.Errorf("%w (%w, kernel.yama.ptrace_scope is 2); run: sudo sysctl -w kernel.yama.ptrace_scope=1, and start the node again", ErrKept, err)
	case "3":
		return fmt.Errorf("%w (%w, kernel.yama.ptrace_scope is 3, which stays until the machine starts again); "+
			"set kernel.yama.ptrace_scope = 1 in /etc/sysctl.d, and start the machine again", ErrKept, err)
	}
	return fmt.Errorf("%w (%w); allow pidfd_getfd(2) in the seccomp profile of the container, if this runs in one, or in the policy of "+
		"the security module (SELinux, AppArmor), and start the node again", ErrKept, err)
}

// ErrKept is that a host keeps a program's descriptors from its parent.
var ErrKept = errors.New("a program's descriptors are kept from its parent")

// tapOf duplicates a program's descriptor of its TAP device.
func tapOf(pid int) (int, error) {
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return -1, err
	}
	for _, link := range links {
		if to, err := os.Readlink(link); err != nil || to != tunDevice {
			continue
		}
		number, err := strconv.Atoi(filepath.Base(link))
		if err != nil {
			return -1, err
		}
		return descriptorOf(pid, number)
	}
	return -1, os.ErrNotExist
}

// descriptorOf duplicates a descriptor of another process (pidfd_getfd(2)).
func descriptorOf(pid, number int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pidfd)
	return unix.PidfdGetfd(pidfd, number, 0)
}
