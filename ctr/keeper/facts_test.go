package keeper_test

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// warm lets the libraries open what they keep open, once, before anything is counted.
var warm sync.Once

func facts(t *testing.T) map[string]string {
	t.Helper()
	warm.Do(func() {
		dir := filepath.Join(base, "warm")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		n := openNode(t, dir)
		n.run("warm", spec("true"))
		n.end()
	})
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"mounts": string(mounts), "descriptors": descriptors(), "processes": processes(),
		"cgroups": cgroupDirs()}
}

func compareFacts(t *testing.T, before map[string]string) {
	t.Helper()
	var after map[string]string
	same := func() bool {
		after = facts(t)
		for key := range before {
			if before[key] != after[key] {
				return false
			}
		}
		return true
	}
	for round := range 100 { // a child of the test itself may be on its way out
		if same() {
			break
		}
		if round > 50 {
			// What a container's end has killed may die, on a busy machine, after the keeper has looked for the last time. The node's
			// pid namespace would end with it.
			_, _ = unix.Wait4(-1, nil, unix.WNOHANG, nil)
		}
		runtime.GC() // libcontainer leaves the FIFO of a start that failed to the garbage collector
		time.Sleep(10 * time.Millisecond)
	}
	for key := range before {
		if before[key] != after[key] {
			t.Errorf("%s before:\n%s\nand after:\n%s", key, before[key], after[key])
		}
	}
	if err := goleak.Find(); err != nil {
		t.Error(err)
	}
}

func descriptors() string {
	var all []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.HasSuffix(link, "/fd") {
			all = append(all, e.Name()+" "+link)
		}
	}
	return strings.Join(all, "\n")
}

// processes lists all in this pid namespace, in which the test is PID 1.
func processes() string {
	var all []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if line, err := os.ReadFile(dir + "/cmdline"); err == nil {
			all = append(all, dir+" "+string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
		}
	}
	return strings.Join(all, "\n")
}

// running counts the processes whose command line begins with prefix.
func running(prefix string) int {
	count := 0
	for line := range strings.Lines(processes()) {
		_, cmdline, _ := strings.Cut(line, " ")
		if strings.HasPrefix(cmdline, prefix) {
			count++
		}
	}
	return count
}

func cgroupDirs() string {
	if !cgroups {
		return ""
	}
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	return strings.Join(dirs, "\n")
}
