package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// resources is a container's, as a line of a manifest.
func resources(cpuRequest, memoryRequest, cpuLimit, memoryLimit string) string {
	return fmt.Sprintf("{requests: {cpu: %s, memory: %s}, limits: {cpu: %s, memory: %s}}", cpuRequest, memoryRequest, cpuLimit, memoryLimit)
}

// limited is a pod of containers that run a script each under resources of their own: name, script, resources.
func limited(name string, containers ...[3]string) string {
	text := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  terminationGracePeriodSeconds: 1\n  restartPolicy: Never\n  containers:\n", name)
	for _, c := range containers {
		text += fmt.Sprintf("  - name: %s\n    image: IMAGE\n    command: [sh, -c, %q]\n", c[0], c[1])
		if c[2] != "" {
			text += "    resources: " + c[2] + "\n"
		}
	}
	return text
}

// TestLimitCPU: a container with a limit of 0.2 gets 0.2 of a processor, as the kernel counts it: what was used over the periods
// of its quota that have passed.
func TestLimitCPU(t *testing.T) {
	delegated(t)
	s := newSpace(t)
	s.apply(limited("busy", [3]string{"main", "while :; do :; done", resources("100m", "16Mi", "200m", "64Mi")}))
	s.ready("busy")
	dir := s.group("busy", "main")
	if err := differences(t, dir, map[string]string{"cpu.max": "20000 100000", "../../cpu.max": "20000 100000"}); err != nil {
		t.Error(err)
	}
	const limit, period, tolerance = 0.2, 100_000, 0.1
	sample := func() (used, periods int64) {
		stat := files(t, dir, "cpu.stat")["cpu.stat"]
		return counter(stat, "usage_usec"), counter(stat, "nr_periods")
	}
	used, periods := sample()
	s.eventually("the limit is reached", func() error {
		time.Sleep(10 * time.Second)
		nowUsed, nowPeriods := sample()
		share := float64(nowUsed-used) / float64((nowPeriods-periods)*period)
		t.Logf("a limit of 0.2 gives %.3f of a processor over %d periods of 100 ms", share, nowPeriods-periods)
		used, periods = nowUsed, nowPeriods
		if share > limit*(1+tolerance) {
			t.Fatalf("it gives %.3f", share)
		}
		if share < limit*(1-tolerance) {
			return fmt.Errorf("it gives %.3f", share)
		}
		return nil
	})
}

// TestLimitMemory: a container that is over its limit is killed and told to be; neither its neighbour in the pod nor
// another pod is.
func TestLimitMemory(t *testing.T) {
	delegated(t)
	s := newSpace(t)
	const hog = "sleep 5; exec dd if=/dev/zero of=/dev/null bs=256M count=1"
	s.apply(limited("oom", [3]string{"hog", hog, resources("50m", "48Mi", "500m", "48Mi")},
		[3]string{"neighbour", "exec sleep 1000", resources("50m", "16Mi", "100m", "16Mi")}))
	s.apply(limited("other", [3]string{"main", "exec sleep 1000", ""}))
	s.ready("other")
	status := func(container, field string) string {
		return s.get("pod/oom", `{.status.containerStatuses[?(@.name=="`+container+`")].`+field+`}`)
	}
	s.eventually("the hog is killed", func() error {
		if reason := status("hog", "state.terminated.reason"); reason != "OOMKilled" {
			return fmt.Errorf("its state is %s", status("hog", "state"))
		}
		return nil
	})
	if code := status("hog", "state.terminated.exitCode"); code != "137" {
		t.Errorf("its exit code is %s", code)
	}
	t.Logf("the hog: %s", status("hog", "state"))
	if state := status("neighbour", "state"); !strings.Contains(state, "running") {
		t.Errorf("the neighbour in its pod is %s", state)
	}
	if got := s.get("pod/other", "{.status.containerStatuses[0].state}{.status.containerStatuses[0].restartCount}"); !strings.HasSuffix(got, "0") || !strings.Contains(got, "running") {
		t.Errorf("the other pod is %s", got)
	}
}

// TestLimitPids: the kubelet's podPidsLimit holds a pod that forks without end, and its neighbours go on.
func TestLimitPids(t *testing.T) {
	delegated(t)
	if !inVM {
		t.Skip("only the kubelet of the test VM has a limit; to run this test: make kube-vm")
	}
	s := newSpace(t)
	s.apply(limited("other", [3]string{"main", "exec sleep 1000", ""}))
	s.apply(limited("bomb", [3]string{"main", "(f() { sleep 1000 & sleep 1000 & f; }; f); exec sleep 1000", ""}))
	s.ready("bomb")
	s.ready("other")
	dir := s.group("bomb", "main")
	s.eventually("the kernel refuses a fork", func() error {
		got := files(t, dir, "../../pids.max", "../../pids.current", "../../pids.events", "pids.events")
		if got["../../pids.max"] != fmt.Sprint(podPidsLimit) {
			t.Fatalf("pids.max of the pod is %q", got["../../pids.max"])
		}
		// Older kernels count where the fork was tried, newer ones where the limit is.
		if counter(got["../../pids.events"], "max") < 1 && counter(got["pids.events"], "max") < 1 {
			return fmt.Errorf("files of the pod and the container: %q", got)
		}
		t.Logf("%q", got)
		return nil
	})
	if out := s.exec("other", "echo alive"); strings.TrimSpace(out) != "alive" {
		t.Errorf("the neighbour says %q", out)
	}
}

// TestResize: resources are changed in place, up and down: the same container, other limits, in its cgroup and the pod's,
// and the pod's status tells of them.
func TestResize(t *testing.T) {
	delegated(t)
	s := newSpace(t)
	s.apply(limited("pod", [3]string{"main", "exec sleep 1000", resources("100m", "32Mi", "200m", "64Mi")}))
	s.ready("pod")
	dir := s.group("pod", "main")
	before := s.get("pod/pod", "{.status.containerStatuses[0].containerID}")
	limits := func(quota, memory int) map[string]string {
		return map[string]string{"cpu.max": fmt.Sprintf("%d 100000", quota), "memory.max": fmt.Sprint(memory * mebi),
			"../../cpu.max": fmt.Sprintf("%d 100000", quota), "../../memory.max": fmt.Sprint(memory * mebi)}
	}
	if err := differences(t, dir, limits(20000, 64)); err != nil {
		t.Fatal(err)
	}
	for _, to := range []struct {
		cpu, memory string
		quota, mega int
	}{{"400m", "128Mi", 40000, 128}, {"300m", "48Mi", 30000, 48}} {
		s.kubectl("patch", "pod", "pod", "--subresource", "resize", "--patch",
			fmt.Sprintf(`{"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": %q, "memory": %q}}}]}}`, to.cpu, to.memory))
		s.eventually("the cgroups have the limits "+to.cpu+" and "+to.memory, func() error {
			return differences(t, dir, limits(to.quota, to.mega))
		})
		s.eventually("the status tells them", func() error {
			got := s.get("pod/pod", "{.status.containerStatuses[0].resources.limits.cpu} {.status.containerStatuses[0].resources.limits.memory}")
			if got != to.cpu+" "+to.memory {
				return fmt.Errorf("it is %q", got)
			}
			return nil
		})
	}
	if now := s.get("pod/pod", "{.status.containerStatuses[0].containerID}"); now != before {
		t.Errorf("the container is another one: %s was %s", now, before)
	}
	if n := s.restarts("pod"); n != 0 {
		t.Errorf("it was started again %d times", n)
	}
}
