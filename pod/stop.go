package pod

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// killWait bounds the wait for processes that were sent SIGKILL. Only one that the kernel holds in an
// uninterruptible sleep (a dead network filesystem) lasts so long.
const killWait = 30 * time.Second

// stopPod: "stops any running process that is part of the sandbox and reclaims network resources". What fails
// can be tried again, and what is done is not done twice.
func (s *Service) stopPod(ctx context.Context, id string) error {
	return s.onPod(ctx, "stop", id, s.stopPodLocked)
}

// onPod does one operation on a pod, which no other operation on it overlaps. That the pod is unknown is no error: what
// the two callers are asked for holds then.
func (s *Service) onPod(ctx context.Context, verb, id string, do func(context.Context, *pod) error) error {
	p, err := s.index.pod(id)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	if err := do(ctx, p); err != nil {
		return fmt.Errorf("%s pod %s: %w", verb, p.spec.ID, err)
	}
	return nil
}

func (s *Service) stopPodLocked(ctx context.Context, p *pod) error {
	group, killCtx := errgroup.WithContext(ctx)
	for _, c := range s.index.allContainers(p.spec.ID) {
		group.Go(s.guarded(func() error { return s.kill(killCtx, c) }))
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if p.status.snapshot().ready() {
		s.stopped(p)
	}
	return s.releasePod(ctx, p)
}

// recorded reports a fact that the disk refused. It is no reason to stop: to give things back may be what makes
// room, and the next start of the daemon finds the fact out again.
func (s *Service) recorded(id string, err error) {
	if err != nil {
		s.cfg.Log.Error("state is not on disk", "id", id, "error", err)
	}
}

// releasePod gives back all but the records, the log directory and the cgroup. Idempotent.
func (s *Service) releasePod(ctx context.Context, p *pod) error {
	if p.status.snapshot().Released {
		return nil
	}
	if p.hasPause() {
		if err := s.deps.Containers.Delete(ctx, p.spec.ID); err != nil {
			return fmt.Errorf("end pause process: %w", err)
		}
	}
	if !p.hostNetwork() {
		if err := s.deps.Network.Detach(ctx, p.spec.ID, p.nsPath("net")); err != nil {
			return fmt.Errorf("detach network: %w", err)
		}
	}
	if err := p.unmountAll(); err != nil {
		return err
	}
	s.recorded(p.spec.ID, p.status.fact(func(st *podStatus) { st.Released = true }))
	return nil
}

// kill ends a container at once, and waits until its end is recorded.
func (s *Service) kill(ctx context.Context, c *container) error {
	if !c.status.snapshot().running() {
		return nil
	}
	if err := s.signal(ctx, c, syscall.SIGKILL, true); err != nil {
		return err
	}
	timer := time.NewTimer(killWait)
	defer timer.Stop()
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for container %s to end: %w", c.spec.ID, ctx.Err())
	case <-timer.C:
		return timedOut("container %s lives on %s after SIGKILL: the kernel holds one of its processes (see /proc/%d/stack)",
			c.spec.ID, killWait, c.status.snapshot().Pid)
	}
}

// signal sends sig. A container that the keeper does not know has ended without a record.
func (s *Service) signal(ctx context.Context, c *container, sig syscall.Signal, all bool) error {
	err := s.deps.Containers.Kill(ctx, c.spec.ID, sig, all)
	if isGone(err) {
		s.recorded(c.spec.ID, c.lost("the keeper has no record of the container"))
		return nil
	}
	if err != nil {
		return fmt.Errorf("signal container %s: %w", c.spec.ID, err)
	}
	return nil
}

// removePod: "If there are any running containers in the sandbox, they must be forcibly terminated and removed."
func (s *Service) removePod(ctx context.Context, id string) error {
	return s.onPod(ctx, "remove", id, s.removePodLocked)
}

// removePodLocked deletes the spec last: as long as it is there, a daemon that comes back knows the pod.
func (s *Service) removePodLocked(ctx context.Context, p *pod) error {
	if err := s.stopPodLocked(ctx, p); err != nil {
		return err
	}
	group, removeCtx := errgroup.WithContext(ctx)
	for _, c := range s.index.allContainers(p.spec.ID) {
		group.Go(s.guarded(func() error { return s.removeContainerLocked(removeCtx, c) }))
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if cgroup := p.status.snapshot().Cgroup; cgroup != "" {
		if err := s.deps.Cgroups.RemovePod(cgroup); err != nil {
			return fmt.Errorf("remove pod cgroup: %w", err)
		}
		crash.Point("pod/cgroup-removed")
	}
	if err := removeDir(p.dir); err != nil {
		return err
	}
	if err := remove(s.store.podSpecPath(p.spec.ID)); err != nil {
		return err
	}
	s.index.dropPod(p)
	s.publish(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, p, p.spec.ID)
	return nil
}
