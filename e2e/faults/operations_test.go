package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// operations are the calls that change something. Each is played with whatever adds steps to it: a host port, a pid
// namespace that the pod shares, a volume that is an image.
var operations = []operation{
	{"RunPodSandbox", nil, (*stage).runPod, (*stage).podAgain},
	{"CreateContainer", (*stage).runPod, (*stage).create, (*stage).createAgain},
	{"StartContainer", steps((*stage).runPod, (*stage).create), (*stage).start, (*stage).startAgain},
	{"StopContainer", running, (*stage).stop, steps((*stage).stop, (*stage).stopped)},
	{"RemoveContainer", running, (*stage).remove, steps((*stage).remove, (*stage).removed, (*stage).create, (*stage).start, (*stage).works)},
	{"StopPodSandbox", running, (*stage).stopPod, steps((*stage).stopPod, (*stage).podStopped)},
	{"RemovePodSandbox", running, (*stage).removePod, steps((*stage).removePod, (*stage).podRemoved, running, (*stage).works)},
	{"PullImage", nil, (*stage).pull, (*stage).pullAgain},
	{"PullImage of a tag that moved", steps((*stage).pull, (*stage).move), (*stage).pull, (*stage).pullAgain},
	{"RemoveImage", (*stage).pull, (*stage).removeImage, (*stage).removeImageAgain},
}

var running = steps((*stage).pull, (*stage).runPod, (*stage).createWithVolume, (*stage).start)

func steps(all ...func(*stage) error) func(*stage) error {
	return func(s *stage) error {
		for _, step := range all {
			if err := step(s); err != nil {
				return err
			}
		}
		return nil
	}
}

const hostPort = 18310

func (s *stage) runPod() error {
	s.config = s.podConfig("staged")
	s.config.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: hostPort}}
	s.config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	made, err := s.runtime.RunPodSandbox(s.context(), &runtimeapi.RunPodSandboxRequest{Config: s.config})
	if err == nil {
		s.pod = made.PodSandboxId
	}
	return err
}

// podAgain: a pod of this name is there and ready, or there is none, and it can be made.
func (s *stage) podAgain() error {
	list, err := s.runtime.ListPodSandbox(s.context(), &runtimeapi.ListPodSandboxRequest{})
	switch {
	case err != nil:
		return err
	case len(list.Items) > 1:
		return fmt.Errorf("there are %d pods", len(list.Items))
	case len(list.Items) == 1:
		s.pod = list.Items[0].Id
		if state := list.Items[0].State; state != runtimeapi.PodSandboxState_SANDBOX_READY {
			return fmt.Errorf("the pod is %s", state)
		}
	default:
		if err := s.runPod(); err != nil {
			return err
		}
	}
	return steps((*stage).create, (*stage).start, (*stage).works)(s)
}

func (s *stage) containerConfig() *runtimeapi.ContainerConfig {
	config := containerConfig("c", s.image, "echo run >>/traces/runs; trap 'exit 7' TERM; while :; do usleep 10000; done")
	config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/traces", HostPath: s.path("work")}}
	return config
}

func (s *stage) create() error { return s.createFrom(s.containerConfig()) }

func (s *stage) createWithVolume() error {
	config := s.containerConfig()
	config.Mounts = append(config.Mounts, &runtimeapi.Mount{ContainerPath: "/v", Image: &runtimeapi.ImageSpec{Image: s.registry.name}})
	return s.createFrom(config)
}

func (s *stage) createFrom(config *runtimeapi.ContainerConfig) error {
	if err := os.RemoveAll(s.path("work", "runs")); err != nil {
		return err
	}
	made, err := s.runtime.CreateContainer(s.context(), &runtimeapi.CreateContainerRequest{PodSandboxId: s.pod, Config: config, SandboxConfig: s.config})
	if err == nil {
		s.container = made.ContainerId
	}
	return err
}

func (s *stage) createAgain() error {
	list, err := s.runtime.ListContainers(s.context(), &runtimeapi.ListContainersRequest{})
	switch {
	case err != nil:
		return err
	case len(list.Containers) > 1:
		return fmt.Errorf("there are %d containers", len(list.Containers))
	case len(list.Containers) == 1:
		s.container = list.Containers[0].Id
	default:
		if err := s.create(); err != nil {
			return err
		}
	}
	return steps((*stage).start, (*stage).works)(s)
}

func (s *stage) start() error {
	_, err := s.runtime.StartContainer(s.context(), &runtimeapi.StartContainerRequest{ContainerId: s.container})
	return err
}

func (s *stage) startAgain() error {
	state, err := s.status()
	switch {
	case err != nil:
		return err
	case state.State == runtimeapi.ContainerState_CONTAINER_CREATED:
		if err := s.start(); err != nil {
			return err
		}
	case state.State != runtimeapi.ContainerState_CONTAINER_RUNNING:
		return fmt.Errorf("the container is %s: %s %s", state.State, state.Reason, state.Message)
	}
	return s.works()
}

func (s *stage) status() (*runtimeapi.ContainerStatus, error) {
	answer, err := s.runtime.ContainerStatus(s.context(), &runtimeapi.ContainerStatusRequest{ContainerId: s.container})
	return answer.GetStatus(), err
}

// works: the container runs, has run once, and a command can be executed in it.
func (s *stage) works() error {
	answer, err := s.runtime.ExecSync(s.context(), &runtimeapi.ExecSyncRequest{ContainerId: s.container,
		Cmd: []string{"/bin/sh", "-c", "until [ -s /traces/runs ]; do usleep 1000; done; cat /traces/runs; hostname; exit 3"}})
	if err != nil {
		return err
	}
	if answer.ExitCode != 3 || string(answer.Stdout) != "run\nstaged\n" {
		return fmt.Errorf("in the container: exit code %d, %q, %q", answer.ExitCode, answer.Stdout, answer.Stderr)
	}
	return nil
}

func (s *stage) stop() error {
	if err := s.works(); err != nil { // so that the shell has set its trap
		if state, _ := s.status(); state.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			return err
		}
	}
	_, err := s.runtime.StopContainer(s.context(), &runtimeapi.StopContainerRequest{ContainerId: s.container, Timeout: 20})
	return err
}

func (s *stage) stopped() error {
	state, err := s.status()
	if err != nil {
		return err
	}
	if state.State != runtimeapi.ContainerState_CONTAINER_EXITED || state.ExitCode != 7 || state.Reason != "Error" {
		return fmt.Errorf("the container is %s with exit code %d: %s %s", state.State, state.ExitCode, state.Reason, state.Message)
	}
	return nil
}

func (s *stage) remove() error {
	_, err := s.runtime.RemoveContainer(s.context(), &runtimeapi.RemoveContainerRequest{ContainerId: s.container})
	return err
}

func (s *stage) removed() error {
	list, err := s.runtime.ListContainers(s.context(), &runtimeapi.ListContainersRequest{})
	if err == nil && len(list.Containers) > 0 {
		err = fmt.Errorf("there is a container that is %s", list.Containers[0].State)
	}
	return err
}

func (s *stage) stopPod() error {
	_, err := s.runtime.StopPodSandbox(s.context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.pod})
	return err
}

func (s *stage) podStopped() error {
	state, err := s.status()
	if err != nil {
		return err
	}
	if state.State != runtimeapi.ContainerState_CONTAINER_EXITED || state.ExitCode != 137 {
		return fmt.Errorf("the container is %s with exit code %d: %s %s", state.State, state.ExitCode, state.Reason, state.Message)
	}
	answer, err := s.runtime.PodSandboxStatus(s.context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.pod})
	if err != nil {
		return err
	}
	if answer.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		return fmt.Errorf("the pod is %s", answer.Status.State)
	}
	return s.settles(func(c *census) error {
		for _, kind := range []string{"net/pods", "address", "link", "port"} {
			if len(c.owned[kind]) > 0 {
				return fmt.Errorf("the pod is stopped and has a %s", kind)
			}
		}
		return nil
	})
}

func (s *stage) removePod() error {
	_, err := s.runtime.RemovePodSandbox(s.context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: s.pod})
	return err
}

func (s *stage) podRemoved() error {
	list, err := s.runtime.ListPodSandbox(s.context(), &runtimeapi.ListPodSandboxRequest{})
	if err == nil && len(list.Items) > 0 {
		err = fmt.Errorf("there is a pod that is %s", list.Items[0].State)
	}
	return errors.Join(err, s.removed())
}

// otherImage is one whose tag can be moved. It has a directory that its upper layer leaves out, for which the store makes a
// layer of its own.
type otherImage struct {
	registry *fixture.Registry
	name     string
	version  int
}

func serveOther(t *testing.T) *otherImage {
	t.Helper()
	registry, err := fixture.StartRegistry(fixture.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { registry.Close() })
	o := &otherImage{registry: registry, name: registry.Addr + "/tests/other:1"}
	if err := o.push(); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *otherImage) push() error {
	o.version++
	base, err := fixture.LayerOf(fixture.Gzip, fixture.Dir("www"), fixture.File{Name: "tmp/", Mode: 0o1777, Type: '5'})
	if err != nil {
		return err
	}
	top, err := fixture.LayerOf(fixture.Zstd, fixture.Text("tmp/version", fmt.Sprint(o.version)))
	if err != nil {
		return err
	}
	img, err := fixture.ImageOf(base, top)
	if err != nil {
		return err
	}
	_, err = o.registry.Push(context.Background(), "tests/other:1", img)
	return err
}

func (s *stage) move() error { return s.registry.push() }

func (s *stage) pull() error {
	_, err := s.images.PullImage(s.context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: s.registry.name}})
	return err
}

// pullAgain: an image that is listed is whole.
func (s *stage) pullAgain() error {
	if err := s.runPod(); err != nil {
		return err
	}
	there, err := s.listed()
	if err == nil && there {
		err = s.whole("")
	}
	if err != nil {
		return err
	}
	return errors.Join(s.pull(), s.whole(fmt.Sprint(s.registry.version)))
}

func (s *stage) listed() (bool, error) {
	list, err := s.images.ListImages(s.context(), &runtimeapi.ListImagesRequest{})
	return slices.ContainsFunc(list.GetImages(), func(i *runtimeapi.Image) bool { return slices.Contains(i.RepoTags, s.registry.name) }), err
}

// whole mounts the image and looks at what is in it. Version "" is any.
func (s *stage) whole(version string) error {
	if err := steps((*stage).createWithVolume, (*stage).start, (*stage).works)(s); err != nil {
		return err
	}
	answer, err := s.runtime.ExecSync(s.context(), &runtimeapi.ExecSyncRequest{ContainerId: s.container,
		Cmd: []string{"/bin/sh", "-c", "stat -c %a /v/tmp; ls -d /v/www; cat /v/tmp/version"}})
	if err != nil {
		return err
	}
	if out := string(answer.Stdout); !strings.HasPrefix(out, "1777\n/v/www\n"+version) || answer.ExitCode != 0 {
		return fmt.Errorf("in the image: %q", out)
	}
	return s.remove()
}

func (s *stage) removeImage() error {
	_, err := s.images.RemoveImage(s.context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: s.registry.name}})
	return err
}

func (s *stage) removeImageAgain() error {
	if err := s.runPod(); err != nil {
		return err
	}
	there, err := s.listed()
	if err == nil && there {
		err = s.whole("")
	}
	if err == nil {
		err = s.removeImage()
	}
	if err != nil {
		return err
	}
	if there, err = s.listed(); err == nil && there {
		err = errors.New("the image that was removed is listed")
	}
	return errors.Join(err, s.pull(), s.whole(""))
}
