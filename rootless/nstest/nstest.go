// Package nstest runs a package's tests as uid 0 of a user namespace of their own, with new mount, pid,
// network, IPC, UTS and cgroup namespaces, so that kernel tests need no root and leave nothing behind: the
// kernel takes every mount, veth and process away with the namespaces.
//
// It is imported by tests only, and owns no state but the stage that it keeps in the environment.
package nstest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stageEnv carries the stage of the re-execution: "" outside, then mapped, then inside.
const stageEnv = "CORACLE_NSTEST_STAGE"

const (
	stageMap    = "map"    // in the new user namespace, waiting for its id maps
	stageUnseal = "unseal" // id maps written and capabilities gained: makes the other namespaces
	stageInside = "inside" // runs the tests
)

// InNamespace tells whether the caller runs inside the namespaces that Main makes.
func InNamespace() bool { return os.Getenv(stageEnv) == stageInside }

// IDs returns how many user ids are mapped in the current user namespace.
func IDs() int {
	raw, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return 0
	}
	total := 0
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) == 3 {
			n, err := strconv.Atoi(f[2])
			if err == nil {
				total += n
			}
		}
	}
	return total
}

// Main runs m inside the namespaces and exits the process with the tests' code, or 1 where a test has left a goroutine.
// Call it from TestMain.
// Where the machine refuses a user namespace it prints the kernel's reason and exits 1: a kernel test that
// cannot run has not passed.
func Main(m *testing.M) {
	if err := run(m); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			os.Exit(exit.ExitCode())
		}
		fmt.Fprintln(os.Stderr, "nstest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(m *testing.M) error {
	switch os.Getenv(stageEnv) {
	case "":
		return outside()
	case stageMap:
		return awaitMaps()
	case stageUnseal:
		return makeNamespaces()
	default:
		if err := settle(); err != nil {
			return err
		}
		if code := m.Run(); code != 0 {
			os.Exit(code)
		}
		return CheckGoroutines()
	}
}

func self(stage string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	return cmd
}

// outside makes the user namespace and writes its id maps: the whole identity map for root, this user and its
// subordinate ids through newuidmap(1) for anybody else, this user alone where there are none.
func outside() error {
	cmd := self(stageMap)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, Pdeathsig: syscall.SIGKILL}
	mapLater := true
	switch {
	case os.Geteuid() == 0:
		whole := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65537}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = whole, whole
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		mapLater = false
	case !hasSubIDs():
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
		mapLater = false
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("clone a user namespace: %w", err)
	}
	r.Close()
	if mapLater {
		if err := writeMaps(cmd.Process.Pid); err != nil {
			return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
		}
	}
	if _, err := w.Write([]byte{0}); err != nil {
		return errors.Join(err, cmd.Wait())
	}
	w.Close()
	return cmd.Wait()
}

func hasSubIDs() bool {
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		if start, _ := subIDs(file); start == 0 {
			return false
		}
	}
	_, err := exec.LookPath("newuidmap")
	return err == nil
}

// subIDs returns the first range of the caller in file, (0, 0) where there is none.
func subIDs(file string) (start, count int) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, 0
	}
	name := strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) == 3 && (f[0] == name || f[0] == strconv.Itoa(os.Getuid())) {
			start, _ = strconv.Atoi(f[1])
			count, _ = strconv.Atoi(f[2])
			return start, min(count, 65536)
		}
	}
	return 0, 0
}

func writeMaps(pid int) error {
	for _, m := range []struct {
		tool, file string
		id         int
	}{{"newuidmap", "/etc/subuid", os.Geteuid()}, {"newgidmap", "/etc/subgid", os.Getegid()}} {
		start, count := subIDs(m.file)
		out, err := exec.Command(m.tool, strconv.Itoa(pid), "0", strconv.Itoa(m.id), "1",
			"1", strconv.Itoa(start), strconv.Itoa(count)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("run %s: %w: %s", m.tool, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// awaitMaps waits for the maps, then executes itself: execve of uid 0 is what fills the capability sets
// (user_namespaces(7)).
func awaitMaps() error {
	unix.CloseOnExec(3)
	if _, err := io.ReadFull(os.NewFile(3, "maps"), make([]byte, 1)); err != nil {
		return fmt.Errorf("await id maps: %w", err)
	}
	env := append(os.Environ(), stageEnv+"="+stageUnseal)
	return unix.Exec("/proc/self/exe", os.Args, dedup(env))
}

// dedup keeps the last value of each variable, which execve(2) does not do by itself.
func dedup(env []string) []string {
	seen := map[string]bool{}
	var out []string
	for i := len(env) - 1; i >= 0; i-- {
		key, _, _ := strings.Cut(env[i], "=")
		if !seen[key] {
			seen[key] = true
			out = append(out, env[i])
		}
	}
	return out
}

func makeNamespaces() error {
	cmd := self(stageInside)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP,
		Pdeathsig:  syscall.SIGKILL,
	}
	return cmd.Run()
}

// settle makes the mounts private, and /proc that of the new pid namespace.
func settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}
