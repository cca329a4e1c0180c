package ctr

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"
)

func TestReadProcess(t *testing.T) {
	me, err := ReadProcess(os.Getpid())
	if err != nil || me.Pid != os.Getpid() || me.Parent != os.Getppid() || me.Start == 0 || me.Threads < 2 || me.Zombie {
		t.Errorf("this process: %+v, %v", me, err)
	}
	// A name with the parentheses in which the kernel puts it.
	odd := t.TempDir() + "/a) Z 1 (b"
	if err := os.Symlink("/bin/sleep", odd); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(odd, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := ReadProcess(cmd.Process.Pid)
	if err != nil || p.Parent != os.Getpid() || p.Threads != 1 || p.Zombie || p.Start < me.Start {
		t.Errorf("a child: %+v, %v", p, err)
	}
	all, err := AllProcesses()
	found := slices.IndexFunc(all, func(q Process) bool { return q.Pid == p.Pid && q.Start == p.Start })
	if err != nil || found < 0 || all[found].MountNS == 0 || all[found].MountNS != MountNS(os.Getpid()) {
		t.Errorf("the child is number %d of %d processes, %v", found, len(all), err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(10 * time.Second); !p.Zombie && time.Now().Before(until); time.Sleep(time.Millisecond) {
		if p, err = ReadProcess(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	if resident, _, err := ProcessMemory(p.Pid); !p.Zombie || MountNS(p.Pid) != 0 || resident != 0 || err != nil {
		t.Errorf("a zombie: %+v with %d bytes, %v", p, resident, err)
	}
	_ = cmd.Wait() // killed
	if _, err := ReadProcess(p.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a process that has ended: %v", err)
	}
	if resident, _, err := ProcessMemory(p.Pid); resident != 0 || err != nil {
		t.Errorf("memory of one that has ended: %d, %v", resident, err)
	}
	if files, _, err := ProcessFiles(p.Pid); files != 0 || err != nil {
		t.Errorf("files of one that has ended: %d, %v", files, err)
	}
}

// TestProcessCPUHasThatOfChildren: where nothing but /proc counts, a script must not look idle whose commands work.
func TestProcessCPUHasThatOfChildren(t *testing.T) {
	cmd := exec.Command("sh", "-c", "for i in 1 2 3 4; do (j=0; while [ $j -lt 60000 ]; do j=$((j+1)); done); done; echo; read wait")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	p, err := ReadProcess(cmd.Process.Pid)
	if err != nil {
		t.Error(err)
	}
	in.Close()
	_ = cmd.Wait() // read fails at the end of its input
	used := time.Duration(cmd.ProcessState.SysUsage().(*syscall.Rusage).Utime.Nano())
	if p.CPU < used/2 || p.CPU == 0 {
		t.Errorf("it has used %s, of which /proc told %s", used, p.CPU)
	}
}

func TestProcessMemory(t *testing.T) {
	before, anonBefore, err := ProcessMemory(os.Getpid())
	if err != nil || before == 0 || anonBefore == 0 || anonBefore > before {
		t.Fatalf("%d bytes, %d anonymous, %v", before, anonBefore, err)
	}
	const size = 32 << 20
	block, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < size; i += os.Getpagesize() {
		block[i] = 1
	}
	after, anonAfter, err := ProcessMemory(os.Getpid())
	if err != nil || after < before+size/2 || anonAfter < anonBefore+size/2 {
		t.Errorf("with 32 MiB more: %d and %d bytes, before %d and %d, %v", after, anonAfter, before, anonBefore, err)
	}
	if err := syscall.Munmap(block); err != nil {
		t.Error(err)
	}
}

func TestProcessFiles(t *testing.T) {
	files, sockets, err := ProcessFiles(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	more, moreSockets, err := ProcessFiles(os.Getpid())
	if err != nil || more < files+2 || moreSockets < sockets+1 {
		t.Errorf("%d files, %d sockets; %d and %d before a file and a socket more were opened; %v", more, moreSockets, files, sockets, err)
	}
}
