package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// programs by name; each returns its exit code.
var programs = map[string]func(args []string) int{
	"sh": sh, "pgrep": pgrep, "ipcs": ipcs, "nginx": nginx, "httpd": httpd, "nonewprivs": noNewPrivs, "pause": pause,
}

func main() {
	// nginx shows what it does in the first word of its command line: "nginx: master process …".
	name, _, _ := strings.Cut(filepath.Base(os.Args[0]), ":")
	run, ok := programs[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "guest: no program %q\n", name)
		os.Exit(127)
	}
	os.Exit(run(os.Args))
}

// pgrep prints the processes of that name and fails where there is none.
func pgrep(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: pgrep NAME")
		return 2
	}
	found := 1
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return complain("pgrep", err)
	}
	for _, file := range names {
		name, err := os.ReadFile(file)
		if pid := filepath.Base(filepath.Dir(file)); err == nil && string(bytes.TrimSpace(name)) == args[1] && pid != strconv.Itoa(os.Getpid()) {
			fmt.Println(pid)
			found = 0
		}
	}
	return found
}

// ipcs lists the shared memory segments: "-m" is all that it is asked for.
func ipcs(args []string) int {
	if len(args) != 2 || args[1] != "-m" {
		fmt.Fprintln(os.Stderr, "usage: ipcs -m")
		return 2
	}
	raw, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return complain("ipcs", err)
	}
	fmt.Printf("\n------ Shared Memory Segments --------\n%-10s %-10s %-10s %-10s %-10s %s\n", "key", "shmid", "owner", "perms", "bytes", "nattch")
	for n, line := range strings.Split(strings.TrimSpace(string(raw)), "\n") {
		f := strings.Fields(line)
		if n == 0 || len(f) < 8 {
			continue
		}
		key, _ := strconv.ParseInt(f[0], 10, 64) // the kernel prints it as a signed number
		fmt.Printf("0x%08x %-10s %-10s %-10s %-10s %s\n", uint32(key), f[1], f[7], f[2], f[3], f[6])
	}
	return 0
}

func noNewPrivs([]string) int {
	fmt.Printf("Effective uid: %d\n", os.Geteuid())
	return 0
}

func pause([]string) int {
	waitForEnd()
	return 0
}

// waitForEnd returns on the signals that stop a container.
func waitForEnd() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	<-c
}

// become executes this program again under another name. It goes by the file's own path, since the kernel names a
// process after the file that was executed, and the specs look for that name.
func become(name string) int {
	file, err := os.Executable()
	if err != nil {
		return complain(name, err)
	}
	return complain(name, syscall.Exec(file, []string{name}, os.Environ()))
}

func complain(name string, err error) int {
	_, _ = io.WriteString(os.Stderr, name+": "+err.Error()+"\n")
	return 1
}
