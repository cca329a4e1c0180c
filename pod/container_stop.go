package pod

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

func isGone(err error) bool { return errors.Is(err, ctr.ErrNotFound) }

// stopContainer sends the stop signal, waits, and kills. Several may stop the same container: the signal goes
// out once, and each kills at the end of its own patience.
func (s *Service) stopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := s.index.container(id)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.sendStop(ctx, c, grace); err != nil {
		return fmt.Errorf("stop container %s: %w", c.spec.ID, err)
	}
	if grace > 0 && c.status.snapshot().running() {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-c.exited:
		case <-timer.C:
		case <-ctx.Done():
			// The caller is gone, and with it the decision to kill; it will ask again.
			return fmt.Errorf("stop container %s: wait for its end: %w", c.spec.ID, ctx.Err())
		}
	}
	return s.kill(ctx, c)
}

// sendStop holds the pod's lock for the signal only: a start under way is awaited, a grace period is not.
func (s *Service) sendStop(ctx context.Context, c *container, grace time.Duration) error {
	p, err := s.index.pod(c.spec.PodID)
	if err != nil {
		return nil // removed meanwhile
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	if grace <= 0 || !c.status.snapshot().running() || !c.stopSent.CompareAndSwap(false, true) {
		return nil
	}
	sig := c.spec.StopSignal
	if sig == 0 {
		sig = syscall.SIGTERM
	}
	if err := s.signal(ctx, c, sig, false); err != nil {
		c.stopSent.Store(false)
		return err
	}
	s.recorded(c.spec.ID, c.change(func(st *containerStatus) { st.StopSent = true }))
	return nil
}

// removeContainer: "If the container is running, the container must be forcibly removed."
func (s *Service) removeContainer(ctx context.Context, id string) error {
	c, err := s.index.container(id)
	if errors.Is(err, errNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := s.index.pod(c.spec.PodID)
	if errors.Is(err, errNotFound) {
		return nil // gone with its pod
	}
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	return s.removeContainerLocked(ctx, c)
}

// removeContainerLocked deletes the spec before what belongs to it: what a daemon that dies then leaves has no owner, and is
// swept, so that no container is ever shown of which half is gone. The process ends first: one that does not must not be
// forgotten. What fails is tried again, as the index still has the container. Idempotent.
func (s *Service) removeContainerLocked(ctx context.Context, c *container) error {
	id := c.spec.ID
	if err := s.kill(ctx, c); err != nil {
		return fmt.Errorf("remove container: %w", err)
	}
	for _, step := range []func() error{
		func() error { return s.deleteProcess(ctx, id) },
		func() error { return remove(s.store.containerSpecPath(id)) },
		func() error { return s.store.history.remove(id) },
		func() error { return s.sweepFiles(&c.spec) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("remove container %s: %w", id, err)
		}
	}
	s.index.dropContainer(c)
	s.told(c, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	return nil
}

// sweepContainer gives back everything of a container but its spec.
func (s *Service) sweepContainer(ctx context.Context, spec *containerSpec) error {
	if err := s.deleteProcess(ctx, spec.ID); err != nil {
		return err
	}
	return s.sweepFiles(spec)
}

func (s *Service) deleteProcess(ctx context.Context, id string) error {
	if err := s.deps.Containers.Delete(ctx, id); err != nil {
		return fmt.Errorf("delete process: %w", err)
	}
	return nil
}

// sweepFiles gives back a container's mounts and its directory.
func (s *Service) sweepFiles(spec *containerSpec) error {
	id := spec.ID
	if err := s.deps.Images.UnmountRootfs(id); err != nil {
		return fmt.Errorf("unmount root filesystem: %w", err)
	}
	for owner := range spec.imageVolumes() {
		if err := s.deps.Images.UnmountImageVolume(owner); err != nil {
			return fmt.Errorf("unmount image volume: %w", err)
		}
	}
	dir := s.store.containerDir(id)
	return errors.Join(unpin(filepath.Join(dir, "pid")), removeDir(dir))
}
