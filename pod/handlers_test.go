package pod

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// withHandlers restarts the service with handlers whose program is a file of the test's.
func (h *harness) withHandlers(handlers map[string]Handler) string {
	h.t.Helper()
	program := filepath.Join(h.t.TempDir(), "runtime")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	for name, handler := range handlers {
		handler.Path, handler.Facts.Version = program, "test 1"
		handlers[name] = handler
	}
	h.cfg.Handlers = handlers
	h.restart(nil)
	return program
}

func (h *harness) runBy(handler string, config *runtimeapi.PodSandboxConfig) (string, error) {
	resp, err := h.RunPodSandbox(h.ctx(), &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
	return resp.GetPodSandboxId(), err
}

func (h *harness) mustRunBy(handler string, config *runtimeapi.PodSandboxConfig) string {
	h.t.Helper()
	id, err := h.runBy(handler, config)
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

func sharedPID(config *runtimeapi.PodSandboxConfig) *runtimeapi.PodSandboxConfig {
	config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	return config
}

func TestAHandlerThatNoPodCanHave(t *testing.T) {
	h := newHarness(t)
	program := h.withHandlers(map[string]Handler{"crun": {}, "runsc": {Sandbox: true}})
	_, err := h.runBy("kata", h.podConfig("p"))
	wantCode(t, err, codes.InvalidArgument)
	if err != nil && !strings.Contains(err.Error(), "there are the default one (no name), crun, runsc") {
		t.Errorf("%v", err)
	}
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	_, err = h.runBy("crun", h.podConfig("p"))
	wantCode(t, err, codes.FailedPrecondition)
	if err != nil && !strings.Contains(err.Error(), program) {
		t.Errorf("%v", err)
	}
}

func TestAHandlersRuntimeMakesTheContainersOfItsPods(t *testing.T) {
	h := newHarness(t)
	program := h.withHandlers(map[string]Handler{"crun": {Args: []string{"--debug"}}})
	pod := h.mustRunBy("crun", sharedPID(h.podConfig("p")))
	id := h.launchIn(pod, "c", "sleep 1000")
	if got, want := h.keeper.request(id).Runtime, (&ctr.Runtime{Path: program, Args: []string{"--debug"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("runtime of the container %+v, want %+v", got, want)
	}
	if pause := h.keeper.request(pod); pause.ID == "" || pause.Runtime != nil {
		t.Errorf("the pause process is the keeper's own: %+v", pause)
	}
	if got := h.sandbox(pod).RuntimeHandler; got != "crun" {
		t.Errorf("handler in the status %q", got)
	}
	list, err := h.ListPodSandbox(h.ctx(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 1 || list.Items[0].RuntimeHandler != "crun" {
		t.Errorf("list %v, %v", list, err)
	}
	plain := h.launchIn(h.run(h.podConfig("q")), "c", "sleep 1000")
	if rt := h.keeper.request(plain).Runtime; rt != nil {
		t.Errorf("runtime of the default handler %+v", rt)
	}
}

func TestAHandlerWithSandboxesMakesThePauseProcessToo(t *testing.T) {
	h := newHarness(t)
	program := h.withHandlers(map[string]Handler{"runsc": {Sandbox: true}})
	pod := h.mustRunBy("runsc", h.podConfig("p")) // whose containers share no pid namespace
	pause := h.keeper.request(pod)
	if want := (&ctr.Runtime{Path: program}); !reflect.DeepEqual(pause.Runtime, want) {
		t.Fatalf("runtime of the pause process %+v, want %+v", pause.Runtime, want)
	}
	if got := pause.Spec.Annotations; got[annotationType] != "sandbox" || got[annotationSandbox] != pod {
		t.Errorf("annotations of the pause process %v", got)
	}
	id := h.launchIn(pod, "c", "sleep 1000")
	member := h.keeper.request(id)
	if want := (&ctr.Runtime{Path: program, Sandbox: pod}); !reflect.DeepEqual(member.Runtime, want) {
		t.Errorf("runtime of the container %+v, want %+v", member.Runtime, want)
	}
	if got := member.Spec.Annotations; got[annotationType] != "container" || got[annotationSandbox] != pod || member.Spec.Hostname != "p" {
		t.Errorf("annotations of the container %v, hostname %q", got, member.Spec.Hostname)
	}
	target := shell("t", "sleep 1")
	target.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}}}
	_, err := h.tryCreate(pod, target)
	wantCode(t, err, codes.FailedPrecondition)

	// The end of the sandbox is the end of the pod, seen or not.
	h.restart(func() {
		if err := h.keeper.Kill(h.ctx(), pod, syscall.SIGKILL, true); err != nil {
			t.Error(err)
		}
	})
	eventually(t, func() bool { return h.sandbox(pod).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY })
}

// TestAHandlerThatComesBack: a program that is being replaced while the daemon starts is asked again.
func TestAHandlerThatComesBack(t *testing.T) {
	h := newHarness(t)
	program := filepath.Join(t.TempDir(), "runtime")
	h.cfg.Handlers = map[string]Handler{"late": {Path: program}}
	h.restart(nil)
	_, err := h.runBy("late", h.podConfig("p"))
	wantCode(t, err, codes.FailedPrecondition)
	if err := os.WriteFile(program, []byte("#!/bin/sh\nprintf 'late 2\\n+SECCOMP\\n'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.mustRunBy("late", h.podConfig("p"))
	if got := h.handlers.all()["late"].Facts; got.Version != "late 2" || !got.Seccomp {
		t.Errorf("it is known as %+v", got)
	}
}

// TestLimitsInASandbox: a runtime that keeps a pod's containers in one sandbox gets no limits of a single one.
func TestLimitsInASandbox(t *testing.T) {
	h := newHarness(t)
	h.cfg.Host.Controllers = map[string]bool{"memory": true}
	h.withHandlers(map[string]Handler{"runsc": {Sandbox: true}})
	pod := h.mustRunBy("runsc", h.podConfig("p"))
	config := shell("c", "sleep 1000")
	config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
	st := h.status(h.create(pod, config))
	if !strings.Contains(st.Message, "one sandbox") || st.Resources.Linux.MemoryLimitInBytes != 0 {
		t.Errorf("message %q, in force %v", st.Message, st.Resources.Linux)
	}
	h.cfg.Host.Strict = true
	h.restart(nil)
	config.Metadata.Attempt = 1
	_, err := h.tryCreate(pod, config)
	wantCode(t, err, codes.FailedPrecondition)
}

func TestAPodOutlivesItsHandlersConfiguration(t *testing.T) {
	h := newHarness(t)
	h.withHandlers(map[string]Handler{"crun": {}, "runsc": {Sandbox: true}})
	var pods, created []string
	for _, handler := range []string{"crun", "runsc"} {
		pod := h.mustRunBy(handler, h.podConfig(handler))
		h.launchIn(pod, "runs", "sleep 1000")
		pods, created = append(pods, pod), append(created, h.create(pod, shell("waits", "sleep 1000")))
	}
	h.cfg.Handlers = nil
	h.restart(nil)
	for i, pod := range pods {
		_, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: created[i]})
		wantCode(t, err, codes.FailedPrecondition)
		if err != nil && !strings.Contains(err.Error(), "not configured any more") {
			t.Errorf("%v", err)
		}
		_, err = h.tryCreate(pod, shell("new", "sleep 1000"))
		wantCode(t, err, codes.FailedPrecondition)
		if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
		if _, err := h.RemovePodSandbox(h.ctx(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
	}
}

func TestWhatAHandlerDoesNotSupportIsRefused(t *testing.T) {
	h := newHarness(t)
	h.withHandlers(map[string]Handler{"old": {}, "new": {Facts: ctr.RuntimeFacts{MountOptions: []string{"ro", "rro"}, Seccomp: true}}})
	dir := t.TempDir()
	recursive := func(m *runtimeapi.Mount) { m.Readonly, m.RecursiveReadOnly = true, true }
	option := func(m *runtimeapi.Mount) { m.MountOptions = []string{"rnoexec"} }
	for _, tc := range []struct {
		handler string
		change  func(*runtimeapi.Mount)
		seccomp bool
		want    codes.Code
		says    string
	}{
		{handler: "", change: recursive}, {handler: "new", change: recursive},
		{handler: "old", change: recursive, want: codes.FailedPrecondition, says: "the mount option rro"},
		{handler: "new", change: option, want: codes.FailedPrecondition, says: "the mount option rnoexec"},
		{handler: "new", seccomp: true},
		{handler: "old", seccomp: true, want: codes.FailedPrecondition, says: "seccomp"},
	} {
		pod := h.mustRunBy(tc.handler, h.podConfig("p"))
		config := shell("c", "sleep 1000")
		if tc.change != nil {
			m := &runtimeapi.Mount{ContainerPath: "/mnt", HostPath: dir}
			tc.change(m)
			config.Mounts = []*runtimeapi.Mount{m}
		}
		if tc.seccomp {
			config.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		}
		_, err := h.tryCreate(pod, config)
		wantCode(t, err, tc.want)
		if err != nil && !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v does not say %q", err, tc.says)
		}
		if _, err := h.RemovePodSandbox(h.ctx(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	status, err := h.Status(h.ctx(), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, handler := range status.RuntimeHandlers {
		if handler.Features.RecursiveReadOnlyMounts {
			got = append(got, handler.Name+"+rro")
		} else {
			got = append(got, handler.Name)
		}
	}
	if want := "+rro new+rro old"; strings.Join(got, " ") != want {
		t.Errorf("handlers %q, want %q", got, want)
	}
	if !strings.Contains(status.Info["config"], `"seccomp":true`) {
		t.Errorf("verbose status has no handlers: %s", status.Info["config"])
	}
}
