package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/e2e/crash"
	"github.com/coracle-cri/coracle/images"
)

// createContainer resolves and records a container; no process is made. The keeper's create is left to
// StartContainer for three reasons: a created container is then nothing but records and a mount, which survive
// the daemon and cost no memory; a program that cannot run is an error of StartContainer, where the kubelet
// expects it; and from RunPodSandbox to running nothing is lost, since the work is the same.
func (s *Service) createContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (string, error) {
	p, err := s.index.pod(req.GetPodSandboxId())
	if err != nil {
		return "", err
	}
	if err := validateContainer(req.GetConfig(), p.spec.Config.PodSandboxConfig); err != nil {
		return "", err
	}
	if err := p.op.lock(ctx); err != nil {
		return "", err
	}
	defer p.op.unlock()
	if err := requireReady(p, "create a container in"); err != nil {
		return "", err
	}
	id := newID()
	name := containerName(p.spec.ID, req.GetConfig().GetMetadata())
	if err := s.index.reserve(name, id); err != nil {
		return "", err
	}
	back := &undo{}
	back.push("name", func(context.Context) error { s.index.release(name, id); return nil })
	if err := s.makeContainer(ctx, p, id, req.GetConfig(), back); err != nil {
		err = fmt.Errorf("create container %q in pod %s: %w", req.GetConfig().GetMetadata().GetName(), p.spec.ID, err)
		return "", errors.Join(err, back.run(ctx))
	}
	return id, nil
}

func requireReady(p *pod, verb string) error {
	if !p.status.snapshot().ready() {
		return wrongState("%s pod %s: the sandbox is not ready", verb, p.spec.ID)
	}
	return nil
}

// makeContainer commits by writing the spec: what a daemon that dies before leaves has no owner, and is swept.
func (s *Service) makeContainer(ctx context.Context, p *pod, id string, config *runtimeapi.ContainerConfig, back *undo) error {
	spec := containerSpec{ID: id, PodID: p.spec.ID, CreatedAt: time.Now(), Config: containerConfig{config}}
	var err error
	if spec.LogPath, err = logPath(p.spec.Config.PodSandboxConfig, config); err != nil {
		return err
	}
	image, err := s.deps.Images.Get(config.GetImage().GetImage())
	if err != nil {
		return fmt.Errorf("resolve image %q: %w", config.GetImage().GetImage(), err)
	}
	spec.ImageID, spec.ImageRef = image.ID, imageRef(image)
	if spec.StopSignal, err = ctr.StopSignal(config.GetStopSignal(), image.Config.StopSignal); err != nil {
		return err
	}
	dir := s.store.containerDir(id)
	back.push("records", func(context.Context) error {
		return errors.Join(remove(s.store.containerSpecPath(id)), unpin(filepath.Join(dir, "pid")), removeDir(dir))
	})
	crash.Point("pod/create-begun")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return fmt.Errorf("make container directory: %w", err)
	}
	crash.Point("pod/container-directory-made")
	request, err := s.specRequest(ctx, p, &spec, image, back)
	if err != nil {
		return err
	}
	if spec.OCI, spec.NotApplied, err = ctr.BuildSpec(request); err != nil {
		return err
	}
	if err := s.checkSupport(p, config, spec.OCI); err != nil {
		return err
	}
	p.annotate(spec.OCI, "container")
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("the caller is gone: %w", err) // and would never learn the id
	}
	c := s.newContainer(spec, containerStatus{})
	if err := c.status.save(); err != nil {
		return err
	}
	if err := saveSpec(s.store.containerSpecPath(id), spec); err != nil {
		return err
	}
	s.index.addContainer(c)
	s.told(c, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	return nil
}

// specRequest mounts what the spec names, and gathers the rest.
func (s *Service) specRequest(ctx context.Context, p *pod, spec *containerSpec, image images.Image, back *undo) (ctr.SpecRequest, error) {
	id := spec.ID
	back.push("rootfs", func(context.Context) error { return s.deps.Images.UnmountRootfs(id) })
	rootfs, err := s.deps.Images.MountRootfs(ctx, id, image.ID)
	if err != nil {
		return ctr.SpecRequest{}, fmt.Errorf("mount root filesystem: %w", err)
	}
	volumes, err := s.mountImageVolumes(ctx, spec, back)
	if err != nil {
		return ctr.SpecRequest{}, imageVolumeError{err}
	}
	namespaces, err := s.containerNamespaces(p, spec)
	if err != nil {
		return ctr.SpecRequest{}, err
	}
	sandbox := proto.CloneOf(p.spec.Config.PodSandboxConfig)
	sandbox.Hostname = p.spec.Hostname
	return ctr.SpecRequest{
		ID: id, Pod: sandbox, Container: spec.Config.ContainerConfig,
		Image: ctr.ImageConfig{
			Entrypoint: image.Config.Entrypoint, Cmd: image.Config.Cmd, Env: image.Config.Env,
			WorkingDir: image.Config.WorkingDir, User: image.Config.User, StopSignal: image.Config.StopSignal,
		},
		Rootfs: rootfs, Namespaces: namespaces, Files: p.files(), CgroupsPath: p.cgroupOf(id),
		ImageMounts: volumes, Host: s.cfg.Host,
		Users: ctr.RootfsUsers(rootfs),
	}, nil
}

// mountImageVolumes returns the directory of each image volume by its container path.
func (s *Service) mountImageVolumes(ctx context.Context, spec *containerSpec, back *undo) (map[string]string, error) {
	volumes := map[string]string{}
	for owner, m := range spec.imageVolumes() {
		image, err := s.deps.Images.Get(m.GetImage().GetImage())
		if err != nil {
			return nil, fmt.Errorf("resolve image volume %q at %s: %w", m.GetImage().GetImage(), m.GetContainerPath(), err)
		}
		back.push("image volume", func(context.Context) error { return s.deps.Images.UnmountImageVolume(owner) })
		dir, err := s.deps.Images.MountImageVolume(ctx, owner, image.ID, m.GetImageSubPath())
		if err != nil {
			return nil, fmt.Errorf("mount image volume %q at %s: %w", m.GetImage().GetImage(), m.GetContainerPath(), err)
		}
		volumes[m.GetContainerPath()] = dir
	}
	return volumes, nil
}

// containerNamespaces: network, IPC and UTS are the pod's; the pid namespace is the container's choice.
func (s *Service) containerNamespaces(p *pod, spec *containerSpec) (ctr.Namespaces, error) {
	ns := s.podNamespaces(p)
	options := spec.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch options.GetPid() {
	case runtimeapi.NamespaceMode_NODE:
		ns.HostPID = true
	case runtimeapi.NamespaceMode_CONTAINER:
	case runtimeapi.NamespaceMode_TARGET:
		pin, err := s.pinTarget(p, spec.ID, options.GetTargetId())
		ns.PID = pin
		return ns, err
	default:
		switch mode := p.namespaces().GetPid(); mode {
		case runtimeapi.NamespaceMode_POD:
			ns.PID = p.nsPath("pid")
		case runtimeapi.NamespaceMode_NODE:
			ns.HostPID = true // which is the pod's
		default:
			return ns, invalid("pid namespace mode POD: the sandbox was made with mode %s and has none to share; "+
				"give both POD, or both CONTAINER", mode)
		}
	}
	return ns, nil
}

// pinTarget pins the pid namespace of another container of the pod.
func (s *Service) pinTarget(p *pod, id, targetID string) (string, error) {
	target, err := s.index.container(targetID)
	if err != nil {
		return "", invalid("pid namespace target: %v", err)
	}
	if target.spec.PodID != p.spec.ID {
		return "", invalid("pid namespace target %s belongs to another pod", target.spec.ID)
	}
	st := target.status.snapshot()
	if !st.running() {
		return "", wrongState("pid namespace target %s is %s, not running", target.spec.ID, stateName(st.state()))
	}
	pin := filepath.Join(s.store.containerDir(id), "pid")
	return pin, pinPID(st.Pid, st.PidStart, pin)
}

// imageRef is the "digested reference to the image in use". An image that was imported has only its id.
func imageRef(image images.Image) string {
	if len(image.RepoDigests) > 0 {
		return image.RepoDigests[0]
	}
	return image.ID
}
