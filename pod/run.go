package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/e2e/crash"
	"github.com/coracle-cri/coracle/netslirp"
)

// runPod makes a sandbox, or leaves nothing.
func (s *Service) runPod(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (string, error) {
	config := req.GetConfig()
	handler, err := s.checkHandler(ctx, req.GetRuntimeHandler())
	if err != nil {
		return "", err
	}
	if err := validatePod(config); err != nil {
		return "", err
	}
	if err := ctr.CheckSandbox(config.GetLinux().GetSecurityContext(), s.cfg.Host); err != nil {
		return "", fmt.Errorf("run pod: %w", err)
	}
	spec := podSpec{
		ID: newID(), CreatedAt: time.Now(), Handler: req.GetRuntimeHandler(),
		Sandboxed: handler.Sandbox,
		Hostname:  config.GetHostname(), Config: podConfig{config},
	}
	if spec.Hostname == "" {
		// The CRI wants one unless the pod uses the node's network; crictl and critest send none all the same.
		node, err := os.Hostname()
		if err != nil {
			return "", fmt.Errorf("read the node's hostname: %w", err)
		}
		spec.Hostname = node
	}
	name := podName(config.GetMetadata())
	if err := s.index.reserve(name, spec.ID); err != nil {
		return "", err
	}
	p := newPod(spec, s.store.podDir(spec.ID), podStatus{BootID: s.bootID()})
	back := &undo{}
	back.push("name", func(context.Context) error { s.index.release(name, spec.ID); return nil })
	if err := s.makePod(ctx, p, back); err != nil {
		return "", errors.Join(fmt.Errorf("run pod %s: %w", spec.ID, err), back.run(ctx))
	}
	s.announce(p)
	return spec.ID, nil
}

// makePod acquires what the pod needs, in the order in which one thing needs the other; the network, the pause
// process and the files are made side by side. The records come first: in them a daemon that comes back finds
// what a predecessor may have left.
func (s *Service) makePod(ctx context.Context, p *pod, back *undo) error {
	id := p.spec.ID
	back.push("records", func(context.Context) error { return s.forget(p) })
	crash.Point("pod/run-begun")
	if err := os.Mkdir(p.dir, 0o711); err != nil {
		return fmt.Errorf("make pod directory: %w", err)
	}
	crash.Point("pod/directory-made")
	if err := p.status.save(); err != nil {
		return err
	}
	if err := saveSpec(s.store.podSpecPath(id), p.spec); err != nil {
		return err
	}
	s.index.addPod(p)
	back.push("index", func(context.Context) error { s.index.dropPod(p); return nil })

	cgroup, err := s.makePodCgroup(p, back)
	if err != nil {
		return err
	}
	if err := p.status.transition(func(st *podStatus) { st.Cgroup = cgroup }); err != nil {
		return err
	}
	if err := s.weighPod(p, p.spec.Config.GetLinux().GetOverhead(), p.spec.Config.GetLinux().GetResources()); err != nil {
		return err
	}
	crash.Point("pod/cgroup-weighed")
	back.push("mounts", func(context.Context) error { return p.unmountAll() })
	if err := p.mountEtc(); err != nil {
		return err
	}
	if err := p.ownNamespaces().make(); err != nil {
		return err
	}
	facts, err := s.furnish(ctx, p, back)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("the caller is gone: %w", err) // and would never learn the id
	}
	err = p.status.transition(func(st *podStatus) {
		st.IP, st.AdditionalIPs, st.PausePid = facts.net.IP, facts.net.AdditionalIPs, facts.pause
		st.ReadyAt = time.Now()
	})
	if err != nil {
		return err
	}
	if !p.status.snapshot().ready() {
		return errors.New("the pause process ended at once")
	}
	return nil
}

func (s *Service) makePodCgroup(p *pod, back *undo) (string, error) {
	if !s.deps.Cgroups.Usable() {
		return "", nil
	}
	cgroup, err := s.deps.Cgroups.MakePod(p.spec.Config.GetLinux().GetCgroupParent(), p.spec.ID)
	if err != nil {
		return "", fmt.Errorf("make pod cgroup: %w", err)
	}
	crash.Point("pod/cgroup-made")
	back.push("cgroup", func(context.Context) error { return s.deps.Cgroups.RemovePod(cgroup) })
	return cgroup, nil
}

type podFacts struct {
	net   netslirp.Attachment
	pause int
}

// furnish makes what only needs the namespaces, side by side.
func (s *Service) furnish(ctx context.Context, p *pod, back *undo) (podFacts, error) {
	var facts podFacts
	group, ctx := errgroup.WithContext(ctx)
	attached := make(chan struct{})
	group.Go(s.guarded(func() (err error) {
		defer close(attached)
		facts.net, err = s.attach(ctx, p, back)
		return err
	}))
	group.Go(s.guarded(func() (err error) {
		if p.spec.Sandboxed {
			<-attached // a sandbox takes the addresses over that it finds at its start
		}
		facts.pause, err = s.startPause(ctx, p, back)
		return err
	}))
	group.Go(s.guarded(func() error {
		if err := p.mountShm(); err != nil {
			return err
		}
		takeBack, err := makeLogDir(p.spec.Config.GetLogDirectory())
		if err != nil {
			return err
		}
		back.push("log directory", func(context.Context) error { return takeBack() })
		return s.writeFiles(p)
	}))
	return facts, group.Wait()
}

// attach connects the pod, then does what needs its address and its interface.
func (s *Service) attach(ctx context.Context, p *pod, back *undo) (netslirp.Attachment, error) {
	if p.hostNetwork() {
		return netslirp.Attachment{}, p.writeHosts(nil)
	}
	ports, err := portMappings(p.spec.Config.GetPortMappings())
	if err != nil {
		return netslirp.Attachment{}, err
	}
	got, err := s.deps.Network.Attach(ctx, netslirp.AttachRequest{PodID: p.spec.ID, NetNS: p.nsPath("net"), Ports: ports})
	if err != nil {
		return got, fmt.Errorf("attach network: %w", err)
	}
	back.push("network", func(ctx context.Context) error {
		return s.deps.Network.Detach(ctx, p.spec.ID, p.nsPath("net"))
	})
	if err := p.writeLateSysctls(); err != nil {
		return got, err
	}
	return got, p.writeHosts(append([]string{got.IP}, got.AdditionalIPs...))
}

// startPause runs PID 1 of a shared pid namespace, and pins the namespace so that containers join it by a path
// that no other process can take over. A handler with sandboxes needs the process in any case.
func (s *Service) startPause(ctx context.Context, p *pod, back *undo) (int, error) {
	if !p.hasPause() || ctx.Err() != nil {
		return 0, ctx.Err()
	}
	id := p.spec.ID
	spec, err := ctr.PauseSpec(ctr.PauseRequest{
		Rootfs: pauseDir(s.cfg), Pod: p.spec.Config.PodSandboxConfig, Namespaces: s.podNamespaces(p),
		CgroupsPath: p.cgroupOf(id), Host: s.cfg.Host,
	})
	if err != nil {
		return 0, err
	}
	p.annotate(spec, "sandbox")
	runtime, err := s.runtimeOf(p, true)
	if err != nil {
		return 0, err
	}
	back.push("pause process", func(ctx context.Context) error { return s.deps.Containers.Delete(ctx, id) })
	if _, err := s.deps.Containers.Create(ctx, ctr.CreateRequest{ID: id, Spec: spec, Runtime: runtime}); err != nil {
		return 0, fmt.Errorf("create pause process: %w", err)
	}
	state, err := s.deps.Containers.Start(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("start pause process: %w", err)
	}
	if !p.sharesPID() {
		return state.Pid, nil
	}
	return state.Pid, pinPID(state.Pid, state.PidStart, p.nsPath("pid"))
}

// pauseDir is the root filesystem of every pause process. It lives as long as the data, since pods of a daemon
// that was replaced go on using it.
func pauseDir(cfg Config) string { return filepath.Join(cfg.DataDir, "pause") }

// podNamespaces are those that every process of the pod joins.
func (s *Service) podNamespaces(p *pod) ctr.Namespaces {
	// The keeper lives in the host's network namespace, so that of the node is joined by path like any other.
	ns := ctr.Namespaces{Net: s.netNS(p), HostUTS: p.hostNetwork(), HostIPC: p.hostIPC()}
	if !ns.HostUTS {
		ns.UTS = p.nsPath("uts")
	}
	if !ns.HostIPC {
		ns.IPC = p.nsPath("ipc")
	}
	return ns
}

// cgroupOf is the cgroup of a process of the pod, "" where there are none.
func (p *pod) cgroupOf(id string) string {
	parent := p.status.snapshot().Cgroup
	if parent == "" || p.spec.Sandboxed && id != p.spec.ID { // the containers live in the sandbox's
		return ""
	}
	return path.Join(parent, id)
}
