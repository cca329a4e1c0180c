package pod

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/netslirp"
)

// harness is a service on working fakes. At its end nothing may be left: on disk, in memory, in the kernel.
type harness struct {
	*Service
	t       testing.TB
	cfg     Config
	keeper  *fakeKeeper
	network *fakeNetwork
	images  *fakeImages
	cgroups *fakeCgroups
	logs    string
}

func newHarness(t testing.TB) *harness {
	t.Helper()
	dir := t.TempDir()
	goroutines := []goleak.Option{goleak.IgnoreCurrent(),
		// These are of client-go, which lets them end by themselves: at its next ping, and 30 s after a connection was lost.
		goleak.IgnoreTopFunction("k8s.io/client-go/tools/remotecommand.(*heartbeat).start"),
		goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Stream).WaitTimeout")}
	h := &harness{t: t, keeper: newFakeKeeper(), logs: filepath.Join(dir, "logs")}
	if err := upLoopback(); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "run", "rk", "netns")
	set := nsSet{kinds: []nsKind{{"net", unix.CLONE_NEWNET, node}}}
	if err := set.make(); err != nil {
		t.Fatal(err)
	}
	if err := inNetNS(node, upLoopback); err != nil {
		t.Fatal(err)
	}
	h.network = &fakeNetwork{node: node, attached: map[string]netslirp.AttachRequest{}}
	h.images = &fakeImages{root: filepath.Join(dir, "rootfs"), mounted: map[string]bool{}, volumes: map[string]bool{}}
	h.cgroups = &fakeCgroups{root: filepath.Join(dir, "cgroup")}
	host, err := ctr.GatherHost(ctr.HostOptions{CgroupUsable: true})
	if err != nil {
		t.Fatal(err)
	}
	h.cfg = Config{
		RuntimeDir: filepath.Join(dir, "run"), DataDir: filepath.Join(dir, "data"), Version: "0.1.0",
		StreamAddr: "127.0.0.1:0", Host: host, Policy: "best-effort",
		Conditions: []Condition{{Type: "MemoryController", Reason: "NotDelegated", Message: "no memory limits"}},
		SysInfo:    map[string]string{"kernel": "test"},
		Log:        slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	h.open()
	t.Cleanup(func() {
		h.removeAll()
		h.checkNothingLeft()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		h.keeper.wg.Wait()
		if err := unpin(node); err != nil {
			t.Error(err)
		}
		// A SPDY connection that was closed at both ends waits a second for somebody to ask why.
		for end := time.Now().Add(3 * time.Second); goleak.Find(goroutines...) != nil && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
		goleak.VerifyNone(t, goroutines...)
	})
	return h
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func (h *harness) open() {
	h.t.Helper()
	service, err := Open(h.ctx(), h.cfg, Deps{h.keeper, h.network, h.images, h.cgroups})
	if err != nil {
		h.t.Fatal(err)
	}
	h.Service = service
}

// restart is the death of the daemon; during runs while there is none.
func (h *harness) restart(during func()) {
	h.t.Helper()
	if err := h.Close(); err != nil {
		h.t.Fatal(err)
	}
	if during != nil {
		during()
	}
	h.open()
}

func (h *harness) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *harness) podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname: name, LogDirectory: filepath.Join(h.logs, name),
		Labels: map[string]string{"app": name}, Annotations: map[string]string{"note/" + name: " kept\nas is "},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func (h *harness) tryRun(config *runtimeapi.PodSandboxConfig) (string, error) {
	resp, err := h.RunPodSandbox(h.ctx(), &runtimeapi.RunPodSandboxRequest{Config: config})
	return resp.GetPodSandboxId(), err
}

func (h *harness) run(config *runtimeapi.PodSandboxConfig) string {
	h.t.Helper()
	id, err := h.tryRun(config)
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

// shell runs a shell script as its program.
func shell(name, script string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: testImage},
		Command: []string{"/bin/sh", "-c", script}, LogPath: name + "/0.log",
		Labels: map[string]string{"name": name}, Annotations: map[string]string{"a": "b", "note/" + name: " kept\nas is "},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func (h *harness) tryCreate(pod string, config *runtimeapi.ContainerConfig) (string, error) {
	resp, err := h.CreateContainer(h.ctx(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: config})
	return resp.GetContainerId(), err
}

func (h *harness) create(pod string, config *runtimeapi.ContainerConfig) string {
	h.t.Helper()
	id, err := h.tryCreate(pod, config)
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

func (h *harness) start(id string) {
	h.t.Helper()
	if _, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		h.t.Fatal(err)
	}
}

// launchIn creates and starts.
func (h *harness) launchIn(pod, name, script string) string {
	h.t.Helper()
	id := h.create(pod, shell(name, script))
	h.start(id)
	return id
}

func (h *harness) stop(id string, timeout int64) {
	h.t.Helper()
	if _, err := h.StopContainer(h.ctx(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: timeout}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) status(id string) *runtimeapi.ContainerStatus {
	h.t.Helper()
	resp, err := h.ContainerStatus(h.ctx(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.GetStatus()
}

func (h *harness) sandbox(id string) *runtimeapi.PodSandboxStatus {
	h.t.Helper()
	resp, err := h.PodSandboxStatus(h.ctx(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.GetStatus()
}

// exited waits for the end of a container.
func (h *harness) exited(id string) *runtimeapi.ContainerStatus {
	h.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if st := h.status(id); st.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return st
		}
	}
	h.t.Fatalf("container %s did not end: %v", id, h.status(id))
	return nil
}

func (h *harness) removeAll() {
	for _, p := range h.listPods(nil) {
		if _, err := h.RemovePodSandbox(h.ctx(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			h.t.Error(err)
		}
	}
}

// checkNothingLeft compares disk, memory and kernel.
func (h *harness) checkNothingLeft() {
	h.t.Helper()
	for _, dir := range []string{h.cfg.RuntimeDir, h.cfg.DataDir} {
		for _, sub := range []string{"pods", "containers"} {
			entries, err := os.ReadDir(filepath.Join(dir, sub))
			if err != nil || len(entries) > 0 {
				h.t.Errorf("left in %s/%s: %v %v", dir, sub, entries, err)
			}
		}
	}
	if left, _ := filepath.Glob(h.store.history.path("*")); len(left) > 0 {
		h.t.Errorf("left of the history: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		h.t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.cfg.RuntimeDir+"/pods") || strings.Contains(line, h.cfg.RuntimeDir+"/containers") {
			h.t.Errorf("mount left: %s", line)
		}
	}
	if n := len(h.index.names) + len(h.index.pods) + len(h.index.containers); n > 0 {
		h.t.Errorf("index holds %d entries: %v", n, h.index.names)
	}
	if len(h.network.attached) > 0 || len(h.images.mounted) > 0 || len(h.images.volumes) > 0 || len(h.cgroups.pods()) > 0 {
		h.t.Errorf("left: network %v, images %v %v, cgroups %v", h.network.attached, h.images.mounted, h.images.volumes, h.cgroups.pods())
	}
	if states, _ := h.keeper.List(h.ctx()); len(states) > 0 {
		h.t.Errorf("keeper has %v", states)
	}
}

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("got %v, want code %s", err, want)
	}
}
