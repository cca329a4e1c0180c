package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// processes are the ways to the node's own programs: PID 1, the keeper and the daemon.
func processes() []attempt {
	var out []attempt
	for _, target := range []string{"init", "keeper", "daemon"} {
		add := func(what string, try func(pid int) (string, error)) {
			out = append(out, attempt{target + ": " + what, func() (string, error) {
				pid, err := find(target)
				if err != nil {
					return "", err
				}
				return try(pid)
			}})
		}
		add("see", func(pid int) (string, error) { return strconv.Itoa(pid), nil })
		add("signal", func(pid int) (string, error) { return "", unix.Kill(pid, 0) })
		add("trace", trace)
		add("look without CAP_SYS_PTRACE", look)
		add("read memory", func(pid int) (string, error) { return peek(pid, os.O_RDONLY) })
		add("write memory", func(pid int) (string, error) { return peek(pid, os.O_RDWR) })
		add("read memory by process_vm_readv", vmRead)
		add("read environment", func(pid int) (string, error) { return read(proc(pid, "environ")) })
		add("read descriptors", readDescriptors)
		add("take a descriptor", takeDescriptor)
		add("root directory", func(pid int) (string, error) { return list(proc(pid, "root") + "/") })
		add("write program", func(pid int) (string, error) { return openOnly(proc(pid, "exe")) })
		add("join mount namespace", func(pid int) (string, error) { return join(pid, "mnt", unix.CLONE_NEWNS) })
		add("join network namespace", func(pid int) (string, error) { return join(pid, "net", unix.CLONE_NEWNET) })
	}
	return out
}

func proc(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// find goes by the command line, which everybody may read.
func find(target string) (int, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, file := range lines {
		raw, err := os.ReadFile(file)
		args := strings.Split(string(bytes.TrimRight(raw, "\x00")), "\x00")
		if err != nil || len(args) < 2 {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		program := filepath.Base(args[0])
		if program == "exe" || program == "coracle" {
			program = "coracle " + args[1]
		}
		switch {
		case target == "keeper" && program == "coracle-keeper" && args[1] != "init",
			target == "daemon" && program == "coracle daemon",
			target == "init" && pid == 1 && program == "coracle up":
			return pid, nil
		}
	}
	return 0, fmt.Errorf("not seen: %w", errAbsent)
}

// trace seizes the process, which does not stop it, and lets go when this thread ends.
func trace(pid int) (string, error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
		if errno != 0 {
			done <- errno
			return
		}
		done <- nil
	}()
	return "", <-done
}

// look asks for what a process tells whoever may trace it, on a thread that gives CAP_SYS_PTRACE up where it has it. Who
// has the other capabilities of the process needs that one only where its memory is not dumpable (ptrace(2), "Ptrace
// access mode checking"). An own child has no more than this program, and is dumpable: where the call does not tell of that
// either, it cannot tell anything, and the attempt has not been kept.
func look(pid int) (string, error) {
	child := exec.Command("/bin/sleep", "1000")
	if err := child.Start(); err != nil {
		return "no child to compare with: " + err.Error(), nil
	}
	defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
	detail := ""
	err := onThread(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&header, &caps[0])
		caps[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
		if err == nil {
			err = unix.Capset(&header, &caps[0])
		}
		if err == nil {
			err = robustList(child.Process.Pid)
		}
		if err != nil {
			detail = "the call does not work: " + err.Error()
			return nil
		}
		return robustList(pid)
	})
	return detail, err
}

// robustList is get_robust_list(2), for which the kernel has no limit but that on who may look.
func robustList(pid int) error {
	var head, size uintptr
	if _, _, errno := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, uintptr(pid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&size))); errno != 0 {
		return errno
	}
	return nil
}

// firstMapping is an address that can be read.
func firstMapping(pid int) (uint64, error) {
	raw, err := os.ReadFile(proc(pid, "maps"))
	if err != nil {
		return 0, err
	}
	from, _, _ := strings.Cut(string(raw), "-")
	return strconv.ParseUint(from, 16, 64)
}

func peek(pid, how int) (string, error) {
	f, err := os.OpenFile(proc(pid, "mem"), how, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	at, err := firstMapping(pid)
	if err != nil {
		return "", err
	}
	_, err = f.ReadAt(make([]byte, 4), int64(at))
	return "", err
}

func vmRead(pid int) (string, error) {
	at, err := firstMapping(pid)
	if err != nil {
		at = 0x400000 // without a look
	}
	buf := make([]byte, 4)
	local := []unix.Iovec{{Base: &buf[0], Len: 4}}
	_, err = unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: uintptr(at), Len: 4}}, 0)
	return "", err
}

// readDescriptors: the numbers may be listed by whoever has the same user id, which tells nothing; what they are of may not.
func readDescriptors(pid int) (string, error) {
	links, err := filepath.Glob(proc(pid, "fd/*"))
	if err != nil {
		return "", err
	}
	err = errAbsent
	for _, link := range links {
		var to string
		if to, err = os.Readlink(link); err == nil {
			return to, nil
		}
	}
	return "", err
}

func takeDescriptor(pid int) (string, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, 0, 0)
	if err == nil {
		unix.Close(fd)
	}
	return "", err
}

// join enters a namespace on a thread of its own that ends with it.
func join(pid int, name string, kind int) (string, error) {
	ns, err := os.Open(proc(pid, "ns/"+name))
	if err != nil {
		return "", err
	}
	defer ns.Close()
	return "", onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // setns(2): a mount namespace is not for threads that share a root
			return err
		}
		return unix.Setns(int(ns.Fd()), kind)
	})
}

func onThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends
		done <- fn()
	}()
	return <-done
}

func read(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf := make([]byte, 64)
	n, err := f.Read(buf)
	if n == 0 {
		return "", errors.Join(errors.New("it is empty"), err)
	}
	return strconv.Itoa(n) + " bytes", nil
}

func list(path string) (string, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", err
	}
	if len(entries) == 0 {
		return "", errors.New("it is empty")
	}
	return strconv.Itoa(len(entries)) + " entries", nil
}

// openOnly opens for writing, and writes nothing.
func openOnly(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	return "", f.Close()
}
