package cgroupv2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These tests use the subtree that Find finds for whoever runs them, and skip with Find's sentence where there is
// none. They move this process about, so none of them is parallel.

// roleEnv makes the re-executed test binary play a part instead of running the tests.
const roleEnv = "CORACLE_CGROUPV2_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "sleeper":
		select {}
	case "hog":
		hogRole()
	case "inside":
		play(insideRole)
	case "starter":
		play(starterRole)
	case "detached":
		play(detachedRole)
	}
	os.Exit(m.Run())
}

func play(part func() error) {
	if err := part(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

func role(name string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start runs cmd in the cgroup dir from its first instruction on.
func start(cmd *exec.Cmd, dir group) error {
	fd, err := os.Open(string(dir))
	if err != nil {
		return err
	}
	defer fd.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(fd.Fd())
	return cmd.Start()
}

// killed waits for a process and tells whether SIGKILL ended it.
func killed(cmd *exec.Cmd) bool {
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) {
		return false
	}
	return exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
}

func ownGroup(t *testing.T) group {
	t.Helper()
	pl, err := thisHost().locate()
	if err != nil {
		t.Fatal(err)
	}
	return group(pl.dir(pl.own))
}

func delegation(t *testing.T) Delegation {
	t.Helper()
	d, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	if d.Path == "" {
		t.Skip(d.Sentence)
	}
	return d
}

func nodeName(t *testing.T) string {
	return fmt.Sprintf("test-%d-%s", os.Getpid(), strings.ToLower(t.Name()))
}

// enter makes a node as `coracle up` does, and checks at the end that nothing of it is left.
func enter(t *testing.T) (*NodeGroup, *Tree) {
	t.Helper()
	d := delegation(t)
	origin := ownGroup(t)
	before, err := group(d.Path).inForce()
	if err != nil {
		t.Fatal(err)
	}
	g, err := d.Enter(nodeName(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Leave(); err != nil {
			t.Error(err)
		}
		for _, dir := range []group{g.node, g.door} {
			if dir.exists() {
				t.Errorf("%s is left", dir)
			}
		}
		if now := ownGroup(t); now != origin {
			t.Errorf("this process is left in %s, it came from %s", now, origin)
		}
		if after, err := group(d.Path).inForce(); err != nil || !slices.Equal(after, before) {
			t.Errorf("controllers %v are left enabled, %v before; %v", after, before, err)
		}
	})
	if now := ownGroup(t); now != g.node {
		t.Fatalf("this process is in %s, want %s", now, g.node)
	}
	// What rootlesskit's evacuation does once the child has its cgroup namespace.
	leaf := g.node.join(supervisor)
	if _, err := leaf.mkdir(); err != nil {
		t.Fatal(err)
	}
	if err := leaf.take(self); err != nil {
		t.Fatal(err)
	}
	tree, err := Open(g.Path())
	if err != nil {
		t.Fatal(err)
	}
	if !tree.Usable() || tree.Reason() != "" {
		t.Fatalf("tree is not whole: %s", tree.Reason())
	}
	if got := tree.Controllers(); !slices.Equal(got, d.Controllers) {
		t.Fatalf("controllers %v in force, want the delegation's %v", got, d.Controllers)
	}
	return g, tree
}

// container makes a pod and a container's cgroup with a process in it.
func container(t *testing.T, tree *Tree, parent, id string) (pod string, cmd *exec.Cmd) {
	t.Helper()
	pod, err := tree.MakePod(parent, id)
	if err != nil {
		t.Fatal(err)
	}
	leaf := tree.mount.join(pod).join("c1")
	if _, err := leaf.mkdir(); err != nil {
		t.Fatal(err)
	}
	cmd = role("sleeper")
	if err := start(cmd, leaf); err != nil {
		t.Fatal(err)
	}
	return pod, cmd
}

func TestPodLifecycle(t *testing.T) {
	_, tree := enter(t)
	pod, cmd := container(t, tree, "", "a")
	if pod != "/pods/poda" {
		t.Fatalf("pod at %s", pod)
	}
	if again, err := tree.MakePod("/", "a"); err != nil || again != pod {
		t.Fatalf("made again: %s, %v", again, err)
	}
	for _, path := range []string{pod, pod + "/c1"} {
		s, err := tree.Details(path)
		for until := time.Now().Add(5 * time.Second); err == nil && *s.CPU.Usage == 0 && time.Now().Before(until); {
			time.Sleep(time.Millisecond) // the kernel adds up by ticks
			s, err = tree.Details(path)
		}
		if err != nil {
			t.Fatal(err)
		}
		if *s.CPU.Usage == 0 {
			t.Errorf("%s: no CPU time in %s", path, show(s))
		}
		for controller, field := range map[string]*uint64{"memory": s.Memory.WorkingSet, "pids": s.Tasks} {
			if has := slices.Contains(tree.Controllers(), controller); has != (field != nil) {
				t.Errorf("%s: controller %s in force: %v, counted: %v", path, controller, has, field != nil)
			}
		}
	}
	if err := tree.Kill(pod); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) {
		t.Error("the container's process was not killed")
	}
	for range 2 {
		if err := tree.RemovePod(pod); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tree.Stats(pod); !errors.Is(err, ErrNotFound) {
		t.Errorf("stats of a removed pod: %v", err)
	}
	if err := tree.Kill(pod); err != nil {
		t.Errorf("kill of a removed pod: %v", err)
	}
}

func TestPodUnderCgroupParent(t *testing.T) {
	_, tree := enter(t)
	kubelet := tree.mount.join("kubepods")
	if _, err := kubelet.mkdir(); err != nil {
		t.Fatal(err)
	}
	pod, cmd := container(t, tree, "/kubepods/burstable/podUID", "b")
	if pod != "/kubepods/burstable/podUID/podb" {
		t.Fatalf("pod at %s", pod)
	}
	// Frozen processes must die, too.
	if err := tree.mount.join(pod).write("cgroup.freeze", "1"); err != nil {
		t.Fatal(err)
	}
	if err := tree.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) {
		t.Error("the container's process was not killed")
	}
	if !tree.mount.join("/kubepods/burstable/podUID").exists() {
		t.Error("the kubelet's cgroup was removed")
	}
}

func TestMakePodTakesBackWhatItMade(t *testing.T) {
	_, tree := enter(t)
	if err := tree.mount.write("cgroup.max.depth", "2"); err != nil {
		t.Fatal(err)
	}
	if _, err := tree.MakePod("/kubepods/burstable", "c"); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("error %v, want the kernel's EAGAIN for a third level", err)
	}
	if tree.mount.join("kubepods").exists() {
		t.Error("a parent is left")
	}
}

func TestRemovePodWhileItForks(t *testing.T) {
	_, tree := enter(t)
	pod, err := tree.MakePod("", "d")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "while :; do sleep 60 & done")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	leaf := tree.mount.join(pod).join("c1") // the pod itself takes no process once it has controllers
	if _, err := leaf.mkdir(); err != nil {
		t.Fatal(err)
	}
	if err := start(cmd, leaf); err != nil {
		t.Fatal(err)
	}
	time.Sleep(30 * time.Millisecond)
	if err := tree.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) {
		t.Error("the forking process was not killed")
	}
}

func TestManyPodsAtOnce(t *testing.T) {
	_, tree := enter(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			parent := []string{"", "/kubepods/besteffort"}[i%2]
			pod, err := tree.MakePod(parent, fmt.Sprint(i))
			if err == nil {
				err = tree.RemovePod(pod)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestStatsOfMemory has the kernel kill a process for its cgroup's limit, where there are limits.
func TestStatsOfMemory(t *testing.T) {
	_, tree := enter(t)
	if !slices.Contains(tree.Controllers(), "memory") {
		t.Skip("the memory controller is not delegated")
	}
	const limit = 32 << 20
	pod, err := tree.MakePod("", "f")
	if err != nil {
		t.Fatal(err)
	}
	leaf := tree.mount.join(pod).join("c1")
	if _, err := leaf.mkdir(); err != nil {
		t.Fatal(err)
	}
	if err := leaf.write("memory.max", fmt.Sprint(limit)); err != nil {
		t.Fatal(err)
	}
	cmd := role("hog")
	if err := start(cmd, leaf); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) {
		t.Fatal("the process outlived its limit")
	}
	s, err := tree.Details(pod + "/c1")
	if err != nil {
		t.Fatal(err)
	}
	if m := s.Memory; m.OOMKills == nil || *m.OOMKills != 1 || m.LimitHits == nil || *m.LimitHits == 0 || m.Limit == nil || *m.Limit != limit ||
		m.Usage == nil || m.RSS == nil || m.Cache == nil || m.Faults == nil || s.MemoryPressure == nil {
		t.Errorf("after the kill: %s", show(s))
	}
}

// hogRole touches four times the limit.
func hogRole() {
	for range 128 {
		block, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			os.Exit(1)
		}
		for i := 0; i < len(block); i += os.Getpagesize() {
			block[i] = 1
		}
	}
	os.Exit(0)
}

// TestKillByPids is the way of kernels before 5.14, on nested cgroups.
func TestKillByPids(t *testing.T) {
	_, tree := enter(t)
	pod, cmd := container(t, tree, "", "e")
	if err := tree.mount.join(pod).killByPids(); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) {
		t.Error("the container's process was not killed")
	}
}

// TestProcessesOfNestedCgroups: a container may make cgroups of its own, and its processes live there.
func TestProcessesOfNestedCgroups(t *testing.T) {
	_, tree := enter(t)
	pod, cmd := container(t, tree, "", "g")
	inner := tree.mount.join(pod).join("c1/inner/innermost")
	if err := os.MkdirAll(string(inner), 0o755); err != nil {
		t.Fatal(err)
	}
	second := role("sleeper")
	if err := start(second, inner); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pod, pod + "/c1"} {
		pids, err := tree.Processes(path)
		if slices.Sort(pids); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid, second.Process.Pid}) {
			t.Errorf("%s has processes %v, %v, want %d and %d", path, pids, err, cmd.Process.Pid, second.Process.Pid)
		}
	}
	if err := tree.RemovePod(pod); err != nil {
		t.Fatal(err)
	}
	if !killed(cmd) || !killed(second) {
		t.Error("a process outlived its pod")
	}
	if pids, err := tree.Processes(pod); !errors.Is(err, ErrNotFound) {
		t.Errorf("a removed pod has processes %v, %v", pids, err)
	}
}

// benchTree is a node's tree with 50 pods of one container each, which sleeps.
func benchTree(b *testing.B) (*Tree, []string) {
	d, err := Find()
	if err != nil {
		b.Fatal(err)
	}
	if d.Path == "" {
		b.Skip(d.Sentence)
	}
	g, err := d.Enter(fmt.Sprintf("bench-%d", os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := g.Leave(); err != nil {
			b.Error(err)
		}
	})
	leaf := g.node.join(supervisor)
	if _, err := leaf.mkdir(); err != nil {
		b.Fatal(err)
	}
	if err := leaf.take(self); err != nil {
		b.Fatal(err)
	}
	tree, err := Open(g.Path())
	if err != nil {
		b.Fatal(err)
	}
	var containers []string
	for i := range 50 {
		pod, err := tree.MakePod("", fmt.Sprint(i))
		if err != nil {
			b.Fatal(err)
		}
		leaf := tree.mount.join(pod).join("c1")
		if _, err := leaf.mkdir(); err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := start(cmd, leaf); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := tree.RemovePod(pod); err != nil {
				b.Error(err)
			}
			_ = cmd.Wait() // killed
		})
		containers = append(containers, pod+"/c1")
	}
	return tree, containers
}

// BenchmarkStats is one pass over 50 containers.
func BenchmarkStats(b *testing.B) {
	tree, containers := benchTree(b)
	for name, read := range map[string]func(string) error{
		"stats":     func(c string) error { _, err := tree.Stats(c); return err },
		"details":   func(c string) error { _, err := tree.Details(c); return err },
		"processes": func(c string) error { _, err := tree.Processes(c); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, c := range containers {
					if err := read(c); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
