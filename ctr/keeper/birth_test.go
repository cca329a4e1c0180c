package keeper_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestTheConversationIsTheOneOfThisVersion: birth speaks with libcontainer's init as libcontainer's other half of this
// version does. With another one, compare its process_linux.go, container_linux.go (newParentProcess, bootstrapData,
// newInitConfig), init_linux.go, setns_init_linux.go, sync.go and message_linux.go before the version is changed here.
func TestTheConversationIsTheOneOfThisVersion(t *testing.T) {
	raw, err := exec.Command("go", "list", "-m", "-json", "github.com/opencontainers/runc").Output()
	if err != nil {
		t.Fatal(err)
	}
	var module struct{ Version string }
	if err := json.Unmarshal(raw, &module); err != nil {
		t.Fatal(err)
	}
	if module.Version != "v1.5.2" {
		t.Errorf("runc is %s, and birth was written for v1.5.2", module.Version)
	}
}

// TestAContainerIsBornInItsCgroup: the init, what it starts and an exec are in the container's cgroup, which is the root
// of its cgroup namespace, and see all processors; its limits are set.
func TestAContainerIsBornInItsCgroup(t *testing.T) {
	delegated(t)
	n := newNode(t)
	s := inCgroup(sh("cat /proc/self/cgroup | grep ^0:; grep Cpus_allowed_list /proc/self/status; sleep 100"), "/c1")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	s.Linux.Resources = &specs.LinuxResources{Unified: map[string]string{"cgroup.max.depth": "7"}}
	pid := n.create("c1", s).Pid
	if !n.keeper.BornInItsCgroup("c1") {
		t.Error("libcontainer has made it")
	}
	if depth, err := os.ReadFile("/sys/fs/cgroup/c1/cgroup.max.depth"); err != nil || strings.TrimSpace(string(depth)) != "7" {
		t.Errorf("limit %q, %v", depth, err)
	}
	n.start("c1")
	eventually(t, "two lines", func() bool { return len(n.lines("c1")) == 2 })
	lines := n.lines("c1")
	if !strings.HasSuffix(lines[0], " 0::/") {
		t.Errorf("in its own view its cgroup is %q", lines[0])
	}
	if strings.HasSuffix(lines[1], "\t0") {
		t.Errorf("processors: %q", lines[1])
	}
	procs, err := os.ReadFile("/sys/fs/cgroup/c1/cgroup.procs")
	if err != nil || !slices.Contains(strings.Fields(string(procs)), strconv.Itoa(pid)) {
		t.Errorf("processes in the cgroup: %q, %v; want %d", procs, err, pid)
	}
	if code := n.execCode("c1", "/bin/sh", "-c", "grep '^0::/exec-' /proc/self/cgroup"); code != 0 {
		t.Errorf("an exec is not in its cgroup: %d", code)
	}
	n.delete("c1")
}

// refuseEnv has a separate keeper run under a filter as the one of a container that does not know clone3(2).
const refuseEnv = "CORACLE_TEST_REFUSE_CLONE3"

func refuseClone3() error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_CLONE3, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("refuse clone3: %w", errno)
	}
	return nil
}

// TestWithoutClone3ContainersAreMovedToTheirCgroups: an init and its execs end up where they are else born, and the log
// says it once.
func TestWithoutClone3ContainersAreMovedToTheirCgroups(t *testing.T) {
	delegated(t)
	t.Setenv(refuseEnv, "yes")
	n, kill := separateNode(t)
	defer kill()
	for _, id := range []string{"c1", "c2"} {
		s := inCgroup(sh("grep ^0: /proc/self/cgroup; sleep 100"), "/"+id)
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
		n.create(id, s)
		n.start(id)
		eventually(t, "a line", func() bool { return len(n.lines(id)) == 1 })
		if line := n.lines(id)[0]; !strings.HasSuffix(line, " 0::/") {
			t.Errorf("%s: in its own view its cgroup is %q", id, line)
		}
		procs, err := os.ReadFile("/sys/fs/cgroup/" + id + "/cgroup.procs")
		if err != nil || len(strings.Fields(string(procs))) == 0 {
			t.Errorf("%s: processes in its cgroup: %q, %v", id, procs, err)
		}
		if code := n.execCode(id, "/bin/sh", "-c", "grep '^0::/exec-' /proc/self/cgroup"); code != 0 {
			t.Errorf("%s: an exec is not in its cgroup: %d", id, code)
		}
		n.delete(id)
	}
	log, err := os.ReadFile(filepath.Join(filepath.Dir(n.dir), "keeper.log"))
	if err != nil {
		t.Fatal(err)
	}
	if told := strings.Count(string(log), "are moved there"); told != 1 {
		t.Errorf("it is told %d times:\n%s", told, log)
	}
}

// TestWhatIsNotPlainIsMadeByLibcontainer: with hooks, and without a cgroup.
func TestWhatIsNotPlainIsMadeByLibcontainer(t *testing.T) {
	delegated(t)
	n := newNode(t)
	hooked := inCgroup(sh("exit 3"), "/hooked")
	hooked.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true"}}}
	for id, s := range map[string]*specs.Spec{"hooked": hooked, "nowhere": sh("exit 3")} {
		n.create(id, s)
		if n.keeper.BornInItsCgroup(id) {
			t.Errorf("%s: it is born", id)
		}
		n.start(id)
		if got := n.exit(id).ExitCode; got != 3 {
			t.Errorf("%s: exit %d", id, got)
		}
		n.delete(id)
	}
}

// TestDamageOfABornContainerDoesNotStopTheReplacement: what its keeper leaves of it is written anew, whatever is there.
func TestDamageOfABornContainerDoesNotStopTheReplacement(t *testing.T) {
	delegated(t)
	inCgroups = true
	defer func() { inCgroups = false }()
	n, kill := separateNode(t)
	defer kill()
	n.create("runs", sh("i=0; while :; do i=$((i+1)); echo $i; echo e$i >&2; done"))
	n.start("runs")
	n.create("created", sh("i=0; while :; do i=$((i+1)); echo $i; echo e$i >&2; done"))
	n.create("ended", sh("exit 3"))
	n.start("ended")
	n.exit("ended")
	if err := errors.Join(os.MkdirAll(filepath.Join(n.dir, "keeper/lc/runs/state.json/inside"), 0o700),
		// As where its record alone could not be removed.
		os.RemoveAll(filepath.Join(n.dir, "keeper/lc/ended")), os.Remove("/sys/fs/cgroup/of-test-ended")); err != nil {
		t.Fatal(err)
	}
	n.replace()
	if code := n.execCode("runs", "sh", "-c", "exit 6"); code != 6 {
		t.Errorf("an exec by the new keeper: %d", code)
	}
	n.start("created")
	n.endAndDelete("runs")
	if code := n.execCode("created", "sleep", "0.5"); code != 0 { // it prints some lines
		t.Errorf("an exec in what was created before: %d", code)
	}
	n.endAndDelete("created")
	if s := n.state("ended"); s.ExitCode != 3 {
		t.Errorf("%+v", s)
	}
	n.delete("ended")
}
