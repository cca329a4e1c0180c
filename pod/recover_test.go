package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/netslirp"
)

// TestDaemonRestart: what runs goes on, and what happened meanwhile is known afterwards.
func TestDaemonRestart(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("p")
	config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	pod := h.run(config)
	gate := filepath.Join(h.logs, "gate")
	lives := h.launchIn(pod, "lives", "sleep 1000")
	ends := h.launchIn(pod, "ends", "while ! [ -e "+gate+" ]; do sleep 0.01; done; exit 42")
	created := shell("created", "exit 5")
	created.Envs = []*runtimeapi.KeyValue{{Key: "RAW", Value: []byte{0xff}}}
	createdID := h.create(pod, created)
	h.restart(func() {
		if err := os.WriteFile(gate, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := h.keeper.proc(ends)
		if err != nil {
			t.Fatal(err)
		}
		<-p.done
	})
	if st := h.sandbox(pod); st.State != runtimeapi.PodSandboxState_SANDBOX_READY || st.Network.Ip != "10.88.0.1" || st.Annotations["note/p"] != " kept\nas is " {
		t.Errorf("pod: %v", st)
	}
	if st := h.status(lives); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("lives: %v", st)
	}
	if st := h.status(ends); st.ExitCode != 42 || st.Reason != "Error" {
		t.Errorf("ends: %v", st)
	}
	resp, err := h.ExecSync(h.ctx(), &runtimeapi.ExecSyncRequest{ContainerId: lives, Cmd: []string{"/bin/echo", "hi"}})
	if err != nil || string(resp.Stdout) != "hi\n" {
		t.Errorf("exec: %v %v", resp, err)
	}
	_, err = h.tryRun(config)
	wantCode(t, err, codes.AlreadyExists)
	_, err = h.tryCreate(pod, shell("lives", ""))
	wantCode(t, err, codes.AlreadyExists)
	c, err := h.index.container(createdID)
	if err != nil || c.spec.Config.Envs[0].Value[0] != 0xff {
		t.Errorf("environment was bent: %v", err)
	}
	h.start(createdID)
	if st := h.exited(createdID); st.ExitCode != 5 {
		t.Errorf("created: %v", st)
	}
	if st := h.status(lives); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("lives: %v", st)
	}
}

// TestNodeRestart: pods of a node that died are NotReady, their containers ended; all can be removed.
func TestNodeRestart(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	running := h.launchIn(pod, "running", "sleep 1000")
	done := h.launchIn(pod, "done", "exit 4")
	h.exited(done)
	created := h.create(pod, shell("created", ""))
	h.restart(func() {
		h.keeper.reboot()
		// The mounts went with the mount namespace.
		if err := unmountPodDir(h.store.podDir(pod)); err != nil {
			t.Fatal(err)
		}
	})
	if st := h.sandbox(pod); st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pod: %v", st)
	}
	if len(h.network.attached) > 0 {
		t.Errorf("addresses of the dead pod: %v", h.network.attached)
	}
	if st := h.status(running); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.Reason != "ContainerStatusUnknown" || st.ExitCode != 137 || st.FinishedAt == 0 {
		t.Errorf("running: %v", st)
	}
	if st := h.status(done); st.ExitCode != 4 || st.Reason != "Error" {
		t.Errorf("done: %v", st)
	}
	_, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: created})
	wantCode(t, err, codes.FailedPrecondition)
	h.run(func() *runtimeapi.PodSandboxConfig { c := h.podConfig("p"); c.Metadata.Attempt = 1; return c }())
}

// TestRuntimeDirLost: after the machine's boot only the specs are there.
func TestRuntimeDirLost(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", "sleep 1000")
	h.restart(func() {
		h.keeper.reboot()
		if err := unmountPodDir(h.store.podDir(pod)); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(h.cgroups.root); err != nil { // the kernel keeps none over a boot
			t.Fatal(err)
		}
		for _, sub := range []string{"pods", "containers"} {
			if err := os.RemoveAll(filepath.Join(h.cfg.RuntimeDir, sub)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if st := h.sandbox(pod); st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || st.Labels["app"] != "p" {
		t.Errorf("pod: %v", st)
	}
	if st := h.status(id); st.Reason != "ContainerStatusUnknown" {
		t.Errorf("container: %v", st)
	}
}

// TestCreationUnderWay: the daemon died in StartContainer while the keeper made the container, which was not done when the
// next daemon looked. The kubelet asks again.
func TestCreationUnderWay(t *testing.T) {
	h := newHarness(t)
	id := h.create(h.run(h.podConfig("p")), shell("c", "exit 5"))
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.keeper.Create(h.ctx(), ctr.CreateRequest{ID: id, Spec: c.oci()}); err != nil {
		t.Fatal(err)
	}
	h.start(id)
	if st := h.exited(id); st.ExitCode != 5 || st.Reason != "Error" {
		t.Errorf("container: %v", st)
	}
}

// TestStopSignalOnce: a kubelet whose StopContainer broke off with the daemon asks again, and the program, which takes its
// time, gets no second signal.
func TestStopSignalOnce(t *testing.T) {
	h := newHarness(t)
	got := filepath.Join(h.logs, "signals")
	id := h.launchIn(h.run(h.podConfig("p")), "c", "trap 'echo x >>"+got+"' QUIT; echo ready >"+got+"; while :; do sleep 0.01; done")
	said := func(want string) func() bool {
		return func() bool { raw, err := os.ReadFile(got); return err == nil && string(raw) == want }
	}
	eventually(t, said("ready\n"))
	for range 2 {
		ctx, cancel := context.WithTimeout(h.ctx(), 300*time.Millisecond)
		_, err := h.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60})
		cancel()
		wantCode(t, err, codes.DeadlineExceeded)
		eventually(t, said("ready\nx\n"))
		h.restart(func() {})
	}
}

// TestHalfMade: a daemon that died inside RunPodSandbox, CreateContainer or StartContainer left these.
func TestHalfMade(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.create(pod, shell("c", "sleep 1000"))
	c, err := h.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	spec := podSpec{ID: newID(), CreatedAt: time.Now(), Hostname: "half", Config: podConfig{h.podConfig("half")}}
	spec.Config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	half := newPod(spec, h.store.podDir(spec.ID), podStatus{BootID: h.bootID()})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h.restart(func() {
		must(os.Mkdir(half.dir, 0o711))
		must(half.status.save())
		must(saveSpec(h.store.podSpecPath(spec.ID), spec))
		cgroup, err := h.cgroups.MakePod("/kubelet", spec.ID)
		must(err)
		must(half.status.transition(func(st *podStatus) { st.Cgroup = cgroup }))
		must(half.ownNamespaces().make())
		must(half.mountShm())
		_, err = h.network.Attach(h.ctx(), netslirp.AttachRequest{PodID: spec.ID, NetNS: half.nsPath("net")})
		must(err)
		for _, stray := range []string{spec.ID, "stray"} {
			_, err = h.keeper.Create(h.ctx(), ctr.CreateRequest{ID: stray, Spec: c.spec.OCI})
			must(err)
			_, err = h.keeper.Start(h.ctx(), stray)
			must(err)
		}
		_, err = h.keeper.Create(h.ctx(), ctr.CreateRequest{ID: id, Spec: c.spec.OCI})
		must(err)
		_, err = h.images.MountRootfs(h.ctx(), "orphan", testImageID)
		must(err)
		orphan := c.spec
		orphan.ID, orphan.PodID = "orphan", "nobody"
		must(saveSpec(h.store.containerSpecPath("orphan"), orphan))
		must(os.Mkdir(h.store.containerDir("no-spec"), 0o700))
		must(os.WriteFile(h.store.podSpecPath("torn")+".tmp", []byte("{"), 0o600))
	})
	if n := len(h.listPods(nil)); n != 1 {
		t.Errorf("%d pods", n)
	}
	if len(h.network.attached) != 1 || len(h.cgroups.pods()) != 1 || len(h.images.mounted) != 1 {
		t.Errorf("left: %v %v %v", h.network.attached, h.cgroups.pods(), h.images.mounted)
	}
	if pinned(half.nsPath("net")) {
		t.Error("a namespace is left")
	}
	if states, _ := h.keeper.List(h.ctx()); len(states) != 0 {
		t.Errorf("keeper: %v", states)
	}
	if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("container: %v", st)
	}
	h.start(id)
	if _, err := os.Stat(h.store.podSpecPath("torn") + tempSuffix); err == nil {
		t.Error("a half-written record is left")
	}
}

// TestHalfMadeCgroup: the daemon died after it had made the pod's cgroup, and before it could record it.
func TestHalfMadeCgroup(t *testing.T) {
	h := newHarness(t)
	spec := podSpec{ID: newID(), CreatedAt: time.Now(), Hostname: "half", Config: podConfig{h.podConfig("half")}}
	half := newPod(spec, h.store.podDir(spec.ID), podStatus{BootID: h.bootID()})
	h.restart(func() {
		_, cgroupErr := h.cgroups.MakePod("", spec.ID)
		if err := errors.Join(os.Mkdir(half.dir, 0o711), half.status.save(), saveSpec(h.store.podSpecPath(spec.ID), spec), cgroupErr); err != nil {
			t.Fatal(err)
		}
	})
	h.checkNothingLeft()
}

// TestTakenBackLater: what a daemon cannot take back is no pod, neither now nor for the next daemon, which tries again.
func TestTakenBackLater(t *testing.T) {
	h := newHarness(t)
	spec := podSpec{ID: newID(), CreatedAt: time.Now(), Hostname: "half", Config: podConfig{h.podConfig("half")}}
	half := newPod(spec, h.store.podDir(spec.ID), podStatus{BootID: h.bootID()})
	h.restart(func() {
		if err := errors.Join(os.Mkdir(half.dir, 0o711), half.status.save(), saveSpec(h.store.podSpecPath(spec.ID), spec)); err != nil {
			t.Fatal(err)
		}
		h.network.set("detach", errors.New("no"))
	})
	for range 2 {
		if pods := h.listPods(nil); len(pods) != 0 {
			t.Errorf("pods: %v", pods)
		}
		h.restart(func() { h.network.set("detach", nil) })
	}
	h.checkNothingLeft()
}

// TestRuntimeDirFull: what a full disk refuses to record has happened all the same. Nothing that ended may seem to
// live on, and all can be stopped and removed, which is what makes room.
func TestRuntimeDirFull(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("p")
	config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	pod := h.run(config)
	a, b := h.launchIn(pod, "a", "sleep 1000"), h.launchIn(pod, "b", "sleep 1000")
	for _, dir := range []string{h.store.podDir(pod), h.store.containerDir(a), h.store.containerDir(b)} {
		// A temporary file that can be neither written nor removed.
		if err := os.MkdirAll(filepath.Join(statusPath(dir)+tempSuffix, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.keeper.Kill(h.ctx(), a, unix.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	if st := h.exited(a); st.ExitCode != 137 {
		t.Errorf("a: %v", st)
	}
	h.restart(nil)
	if st := h.status(a); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
		t.Errorf("a after a restart: %v", st)
	}
	h.stop(b, 0)
	if st := h.status(b); st.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("b: %v", st)
	}
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	if st := h.sandbox(pod); st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pod: %v", st)
	}
}

func TestUnreadableRecord(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	bad, future := h.store.podSpecPath("bad"), h.store.containerSpecPath("future")
	h.restart(func() {
		for path, text := range map[string]string{bad: `{"version":1,"rec`, future: `{"version":99,"record":{}}`} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, path := range []string{bad, future} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
		if err := os.Remove(path + ".unreadable"); err != nil {
			t.Error(err)
		}
	}
	if h.sandbox(pod).State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the good pod suffered")
	}
}

// TestKeeperConnection: events that were missed are asked for again.
func TestKeeperConnection(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	a, b := h.launchIn(pod, "a", "sleep 1000"), h.launchIn(pod, "b", "sleep 1000")
	for _, id := range []string{a, b} {
		h.keeper.drop()
		if err := h.keeper.Kill(h.ctx(), id, unix.SIGKILL, true); err != nil {
			t.Fatal(err)
		}
		if st := h.exited(id); st.ExitCode != 137 {
			t.Errorf("%v", st)
		}
	}
	if h.sandbox(pod).State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("the pod is not ready any more")
	}
}

func TestStoreWritesWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	r := newRecord(path, containerStatus{Pid: 1})
	if err := r.transition(func(st *containerStatus) { st.Pid = 2 }); err != nil {
		t.Fatal(err)
	}
	got, err := loadRecord[containerStatus](path)
	if err != nil || got.Pid != 2 {
		t.Errorf("%+v %v", got, err)
	}
	raw, _ := os.ReadFile(path)
	if !strings.Contains(string(raw), `"version":1`) {
		t.Errorf("%s", raw)
	}
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := r.transition(func(st *containerStatus) { st.Pid = 3 }); err == nil || r.snapshot().Pid != 2 {
		t.Errorf("published what the disk refused: %+v %v", r.snapshot(), err)
	}
	if err := r.fact(func(st *containerStatus) { st.Pid = 4 }); err == nil || r.snapshot().Pid != 4 {
		t.Errorf("a fact that the disk refused: %+v %v", r.snapshot(), err)
	}
}
