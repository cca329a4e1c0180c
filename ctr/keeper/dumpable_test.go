package keeper_test

import (
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/keeper"
)

// TestAKeeperIsNotDumpable: it leaves no core file, whose size is somebody else's limit and whose place is the host's to say,
// and it is not traced without CAP_SYS_PTRACE. After execve(2) it has to be said again.
func TestAKeeperIsNotDumpable(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	pid := n.pid()
	if err := lookAsAnother(t, pid); !errors.Is(err, unix.EPERM) {
		t.Errorf("a keeper: %v", err)
	}
	n.replace()
	if err := lookAsAnother(t, pid); !errors.Is(err, unix.EPERM) || n.pid() != pid {
		t.Errorf("one that took over: %v", err)
	}
	// Any process else of the same user is.
	plain := exec.Command("sleep", "1000")
	if err := plain.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Process.Kill(); _ = plain.Wait() }()
	if err := lookAsAnother(t, plain.Process.Pid); err != nil {
		t.Errorf("a process that is dumpable, which makes this test worth nothing: %v", err)
	}
}

// pid is the keeper's number here, who is PID 1 where it lives.
func (n *node) pid() int {
	n.t.Helper()
	conn, err := net.Dial("unix", filepath.Join(n.dir, keeper.SocketName))
	if err != nil {
		n.t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		n.t.Fatal(err)
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		n.t.Fatal(cerr, err)
	}
	return int(peer.Pid)
}

// lookAsAnother asks for what a process tells whoever may trace it (get_robust_list(2)), on a thread that has all of its
// capabilities but CAP_SYS_PTRACE in effect. Of a process with the same ids and no more capabilities, whose memory is
// dumpable, nobody needs that one (ptrace(2), "Ptrace access mode checking").
func lookAsAnother(t *testing.T, pid int) error {
	t.Helper()
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with what it lacks
		ended <- func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var caps [2]unix.CapUserData
			if err := unix.Capget(&header, &caps[0]); err != nil {
				return err
			}
			caps[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
			if err := unix.Capset(&header, &caps[0]); err != nil {
				return err
			}
			var head, size uintptr
			if _, _, errno := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, uintptr(pid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&size))); errno != 0 {
				return errno
			}
			return nil
		}()
	}()
	return <-ended
}
