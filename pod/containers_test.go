package pod

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("it did not happen")
}

func TestContainerLife(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("app", "echo hello; exit 3")
	config.Envs = []*runtimeapi.KeyValue{{Key: "RAW", Value: []byte{0xff, 0xfe}}}
	id := h.create(pod, config)
	st := h.status(id)
	if st.State != runtimeapi.ContainerState_CONTAINER_CREATED || st.CreatedAt <= 0 || st.StartedAt != 0 || st.Reason != "" {
		t.Errorf("created: %v", st)
	}
	if st.Image.Image != testImage || st.ImageRef != testDigest || st.ImageId != testImageID || st.Annotations["note/app"] != " kept\nas is " || len(st.Annotations) != 2 {
		t.Errorf("image: %v", st)
	}
	if st.StopSignal != runtimeapi.Signal_SIGNAL_SIGQUIT || st.User.Linux.Uid != 0 {
		t.Errorf("stop signal %v, user %v", st.StopSignal, st.User)
	}
	if !strings.Contains(st.Message, "RAW") { // what is not as asked is told while the container lives
		t.Errorf("message %q", st.Message)
	}
	if want := filepath.Join(h.logs, "p/app/0.log"); st.LogPath != want {
		t.Errorf("log path %s", st.LogPath)
	}
	h.start(id)
	st = h.exited(id)
	if st.ExitCode != 3 || st.Reason != "Error" || st.StartedAt == 0 || st.FinishedAt < st.StartedAt {
		t.Errorf("exited: %v", st)
	}
	if raw, err := os.ReadFile(st.LogPath); err != nil || !strings.Contains(string(raw), "hello") {
		t.Errorf("log %q %v", raw, err)
	}
	_, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: id})
	wantCode(t, err, codes.FailedPrecondition)
	if st := h.exited(h.launchIn(pod, "good", "exit 0")); st.Reason != "Completed" || st.ExitCode != 0 {
		t.Errorf("completed: %v", st)
	}
	for range 2 {
		if _, err := h.RemoveContainer(h.ctx(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = h.ContainerStatus(h.ctx(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	wantCode(t, err, codes.NotFound)
}

func TestCreateContainerErrors(t *testing.T) {
	h := newHarness(t)
	pod, other := h.run(h.podConfig("p")), h.run(h.podConfig("other"))
	taken := h.create(pod, shell("taken", "exit 0"))
	with := func(change func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
		c := shell("c", "exit 0")
		change(c)
		return c
	}
	for _, tc := range []struct {
		name   string
		pod    string
		config *runtimeapi.ContainerConfig
		want   codes.Code
	}{
		{"unknown pod", "nope", shell("c", ""), codes.NotFound},
		{"no name", pod, with(func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "" }), codes.InvalidArgument},
		{"no image", pod, with(func(c *runtimeapi.ContainerConfig) { c.Image = nil }), codes.InvalidArgument},
		{"unknown image", pod, with(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "nope" }), codes.NotFound},
		{"name taken", pod, shell("taken", ""), codes.AlreadyExists},
		{"privileged", pod, with(func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }), codes.InvalidArgument},
		{"log path", pod, with(func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../x" }), codes.InvalidArgument},
		{"pid POD", pod, with(func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = modePod }), codes.InvalidArgument},
		{"network of the node in a pod with its own", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = modeNode
		}), codes.InvalidArgument},
		{"ipc of the node in a pod with its own", pod, with(func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Ipc = modeNode }), codes.InvalidArgument},
		{"network of its own", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = modeContainer
		}), codes.InvalidArgument},
		{"no such target", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: "nope"}
		}), codes.InvalidArgument},
		{"target that does not run", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: taken}
		}), codes.FailedPrecondition},
		{"target of another pod", other, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: taken}
		}), codes.InvalidArgument},
		{"group without user", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 1}
		}), codes.InvalidArgument},
		{"no such host path", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: "/no/such/path", ContainerPath: "/x"}}
		}), codes.InvalidArgument},
		{"unknown CDI device", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/gpu=0"}}
		}), codes.InvalidArgument},
		{"unknown image volume", pod, with(func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{Image: &runtimeapi.ImageSpec{Image: testImage}, ContainerPath: "/a"},
				{Image: &runtimeapi.ImageSpec{Image: "nope"}, ContainerPath: "/x"}}
		}), codes.NotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := h.tryCreate(tc.pod, tc.config)
			wantCode(t, err, tc.want)
			if n := len(h.images.mounted) + len(h.images.volumes); n != 1 {
				t.Errorf("%d mounts, want that of the first container", n)
			}
		})
	}
	h.images.set("mount", errors.New("boom"))
	_, err := h.tryCreate(pod, shell("c", ""))
	wantCode(t, err, codes.Internal)
	h.images.set("mount", nil)
	h.create(pod, shell("c", "")) // and the name is free
	again := shell("taken", "")
	again.Metadata.Attempt = 1
	h.create(pod, again)
}

// TestStatusTellsWhatIsInForce: and not what was asked for.
func TestStatusTellsWhatIsInForce(t *testing.T) {
	if nstest.IDs() == 1 {
		t.Skip("this user has no subordinate ids: newuidmap or /etc/subuid is missing")
	}
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("c", "exit 0")
	config.Image.UserSpecifiedImage = "app"
	config.StopSignal = runtimeapi.Signal_SIGNAL_SIGUSR1
	config.Mounts = []*runtimeapi.Mount{{HostPath: "/usr", ContainerPath: "/host", Readonly: true}}
	sc := config.Linux.SecurityContext
	sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 1001}, []int64{7}
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{OomScoreAdj: -1000, CpuShares: 512}
	st := h.status(h.create(pod, config))
	user := st.GetUser().GetLinux()
	if user.GetUid() != 1000 || user.GetGid() != 1001 || !slices.Equal(user.GetSupplementalGroups(), []int64{7, 1001}) {
		t.Errorf("user %v", user)
	}
	if st.StopSignal != runtimeapi.Signal_SIGNAL_SIGUSR1 || st.Image.UserSpecifiedImage != "app" || !proto.Equal(st.Mounts[0], config.Mounts[0]) {
		t.Errorf("status %v", st)
	}
	// No runtime without root goes below its own score, and this harness delegates no controller.
	if r := st.GetResources().GetLinux(); r.GetOomScoreAdj() != int64(h.cfg.Host.OOMScoreAdjMin) || r.GetCpuShares() != 0 {
		t.Errorf("resources %v", r)
	}
	for _, word := range []string{"oom_score_adj -1000", "cpu shares 512"} {
		if !strings.Contains(st.Message, word) {
			t.Errorf("message %q does not say %q", st.Message, word)
		}
	}
}

func TestStartFailure(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("bad", "")
	config.Command = []string{"/no/such/program"}
	id := h.create(pod, config)
	if _, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
		t.Error("no error")
	}
	st := h.status(id)
	if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 128 || st.Reason != "StartError" ||
		!strings.Contains(st.Message, "/no/such/program") || st.FinishedAt == 0 {
		t.Errorf("%v", st)
	}
	h.keeper.setFailure("start", errors.New("boom"))
	other := h.create(pod, shell("c", "sleep 1000"))
	if _, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: other}); err == nil {
		t.Error("no error")
	}
	if st := h.status(other); st.Reason != "StartError" {
		t.Errorf("%v", st)
	}
	if states, _ := h.keeper.List(h.ctx()); len(states) > 0 {
		t.Errorf("the keeper still has %v", states)
	}
}

func TestStopContainer(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	h.stop("unknown", 0)

	polite := h.launchIn(pod, "polite", `trap "exit 7" QUIT; echo ready; while :; do sleep 0.05; done`)
	h.logged(polite, "ready")
	h.stop(polite, 10)
	if st := h.status(polite); st.ExitCode != 7 || st.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("polite: %v", st)
	}
	h.stop(polite, 10)

	rude := h.launchIn(pod, "rude", `trap "" QUIT TERM; echo ready; while :; do sleep 0.05; done`)
	h.logged(rude, "ready")
	begun := time.Now()
	h.stop(rude, 1)
	if st := h.status(rude); st.ExitCode != 137 || time.Since(begun) < time.Second {
		t.Errorf("rude: %v after %s", st, time.Since(begun))
	}

	now := h.launchIn(pod, "now", "sleep 1000")
	h.stop(now, 0)
	if st := h.status(now); st.ExitCode != 137 {
		t.Errorf("timeout 0: %v", st)
	}
	created := h.create(pod, shell("created", "exit 0"))
	h.stop(created, 0)
	if st := h.status(created); st.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("created: %v", st)
	}
}

// logged waits until a container's log has text.
func (h *harness) logged(id, text string) {
	h.t.Helper()
	path := h.status(id).LogPath
	eventually(h.t, func() bool {
		raw, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(raw), text)
	})
}

// TestConcurrentStops: the signal goes out once, the shortest patience kills, and all return.
func TestConcurrentStops(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "c", `trap "echo signal" QUIT; echo ready; while :; do sleep 0.02; done`)
	h.logged(id, "ready")
	begun := time.Now()
	var wg sync.WaitGroup
	for _, grace := range []int64{60, 1, 60} {
		wg.Go(func() { h.stop(id, grace) })
	}
	wg.Wait()
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("took %s", d)
	}
	raw, _ := os.ReadFile(h.status(id).LogPath)
	if n := strings.Count(string(raw), "signal"); n != 1 {
		t.Errorf("%d stop signals", n)
	}
}

func TestStopPodKills(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	a, b := h.launchIn(pod, "a", `trap "" TERM; sleep 1000`), h.launchIn(pod, "b", "sleep 1000")
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{a, b} {
		if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
			t.Errorf("%v", st)
		}
	}
	_, err := h.tryCreate(pod, shell("c", ""))
	wantCode(t, err, codes.FailedPrecondition)
}

func TestListContainers(t *testing.T) {
	h := newHarness(t)
	p1, p2 := h.run(h.podConfig("p1")), h.run(h.podConfig("p2"))
	a, b := h.launchIn(p1, "a", "sleep 1000"), h.create(p2, shell("b", ""))
	state := func(s runtimeapi.ContainerState) *runtimeapi.ContainerStateValue {
		return &runtimeapi.ContainerStateValue{State: s}
	}
	for _, tc := range []struct {
		filter *runtimeapi.ContainerFilter
		want   []string
	}{
		{nil, []string{a, b}},
		{&runtimeapi.ContainerFilter{Id: a[:13]}, []string{a}},
		{&runtimeapi.ContainerFilter{PodSandboxId: p2}, []string{b}},
		{&runtimeapi.ContainerFilter{PodSandboxId: p2[:13], Id: a}, nil},
		{&runtimeapi.ContainerFilter{State: state(runtimeapi.ContainerState_CONTAINER_RUNNING)}, []string{a}},
		{&runtimeapi.ContainerFilter{State: state(runtimeapi.ContainerState_CONTAINER_CREATED)}, []string{b}},
		{&runtimeapi.ContainerFilter{LabelSelector: map[string]string{"name": "b"}}, []string{b}},
	} {
		var got []string
		for _, c := range h.listContainers(tc.filter) {
			got = append(got, c.Id)
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%v: got %v, want %v", tc.filter, got, tc.want)
		}
	}
}

func TestReasons(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		state ctr.State
		want  string
	}{
		{ctr.State{StartedAt: now}, ""},
		{ctr.State{StartedAt: now, FinishedAt: now}, "Completed"},
		{ctr.State{StartedAt: now, FinishedAt: now, ExitCode: 1}, "Error"},
		{ctr.State{StartedAt: now, FinishedAt: now, ExitCode: 137, OOMKilled: true}, "OOMKilled"},
		{ctr.State{StartedAt: now, FinishedAt: now, OOMKilled: true}, "Completed"},
		{ctr.State{FinishedAt: now, Error: "no program"}, "StartError"},
	} {
		c := newContainer(containerSpec{}, t.TempDir(), containerStatus{}, func(*container, runtimeapi.ContainerEventType) {})
		if err := c.observe(tc.state); err != nil {
			t.Fatal(err)
		}
		if got := c.status.snapshot().reason(); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.state, got, tc.want)
		}
		// A late "running" takes nothing back.
		before := c.status.snapshot()
		if err := c.observe(ctr.State{StartedAt: now.Add(-time.Hour)}); err != nil || !before.FinishedAt.IsZero() && c.status.snapshot().state() != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("woken: %+v %v", c.status.snapshot(), err)
		}
	}
}

func TestSignalNames(t *testing.T) {
	for sig, want := range map[syscall.Signal]runtimeapi.Signal{
		syscall.SIGTERM: runtimeapi.Signal_SIGNAL_SIGTERM, syscall.SIGCHLD: runtimeapi.Signal_SIGNAL_SIGCHLD,
		syscall.SIGABRT: runtimeapi.Signal_SIGNAL_SIGABRT, 34: runtimeapi.Signal_SIGNAL_SIGRTMIN,
		37: runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, 64: runtimeapi.Signal_SIGNAL_SIGRTMAX, 32: 0,
	} {
		if got := criSignal(sig); got != want {
			t.Errorf("%d: %s, want %s", sig, got, want)
		}
	}
}

// TestImageVolumes: two volumes of one image, kept over a restart, and gone with the container.
func TestImageVolumes(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	config := shell("c", "exit 0")
	for _, sub := range []string{"", "etc"} {
		config.Mounts = append(config.Mounts, &runtimeapi.Mount{
			ContainerPath: "/volume" + sub, Image: &runtimeapi.ImageSpec{Image: testImage}, ImageSubPath: sub, Readonly: true,
		})
	}
	id := h.create(pod, config)
	h.restart(nil)
	if len(h.images.volumes) != 2 || len(h.images.mounted) != 1 {
		t.Errorf("volumes %v, root filesystems %v", h.images.volumes, h.images.mounted)
	}
	if _, err := h.RemoveContainer(h.ctx(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil || len(h.images.volumes) != 0 {
		t.Errorf("%v: left %v", err, h.images.volumes)
	}
}

// TestImageVolumeFailures: the kubelet tells them by the beginning of the message, people by the rest.
func TestImageVolumeFailures(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	volume := func(image, sub string) *runtimeapi.ContainerConfig {
		c := shell("c", "exit 0")
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/v", Image: &runtimeapi.ImageSpec{Image: image}, ImageSubPath: sub}}
		return c
	}
	for _, tc := range []struct {
		config *runtimeapi.ContainerConfig
		says   string
	}{{volume("nope", ""), "nope"}, {volume(testImage, missingSubPath), missingSubPath}} {
		_, err := h.tryCreate(pod, tc.config)
		wantCode(t, err, codes.NotFound)
		if text := status.Convert(err).Message(); !strings.HasPrefix(text, "ImageVolumeMountFailed: ") || !strings.Contains(text, tc.says) || !strings.Contains(text, "/v") {
			t.Errorf("message %q", text)
		}
		if len(h.images.volumes)+len(h.images.mounted) > 0 {
			t.Errorf("left %v %v", h.images.volumes, h.images.mounted)
		}
	}
	_, err := h.tryCreate(pod, volume("", ""))
	wantCode(t, err, codes.InvalidArgument) // neither an image nor a path
}
