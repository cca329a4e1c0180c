package pod

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// startTimeout bounds a start that no caller waits for any more.
const startTimeout = 2 * time.Minute

// startContainer makes the process and lets it run. A start that fails ends the container: it is Exited with
// reason StartError and exit code 128, as the kubelet's users know it, and the RPC is an error.
func (s *Service) startContainer(ctx context.Context, id string) error {
	c, err := s.index.container(id)
	if err != nil {
		return err
	}
	p, err := s.index.pod(c.spec.PodID)
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	if st := c.status.snapshot().state(); st != runtimeapi.ContainerState_CONTAINER_CREATED {
		return wrongState("start container %s: it is %s, not created", c.spec.ID, stateName(st))
	}
	if err := requireReady(p, "start a container in"); err != nil {
		return err
	}
	// Once begun it is brought to its end: a caller that hangs up must not leave a container half started.
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
	defer cancel()
	state, err := s.launch(work, p, c)
	if err != nil {
		err = fmt.Errorf("start container %s: %w", c.spec.ID, err)
		// What has run out of its time may still be made: the deletion waits for that, in a time of its own.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		return errors.Join(err, c.startFailed(err), s.deps.Containers.Delete(last, c.spec.ID))
	}
	s.recorded(c.spec.ID, c.observe(state)) // it runs, whether that is on disk or not
	return nil
}

func (s *Service) launch(ctx context.Context, p *pod, c *container) (ctr.State, error) {
	runtime, err := s.runtimeOf(p, false)
	if err != nil {
		return ctr.State{}, err
	}
	logs := p.spec.Config.GetLogDirectory()
	if c.spec.LogPath != "" {
		// The kubelet makes the container's directory below the pod's log directory; crictl does not.
		if err := makeLogPlace(logs, c.spec.LogPath); err != nil {
			return ctr.State{}, fmt.Errorf("make log directory: %w", err)
		}
	}
	config := c.spec.Config
	request := ctr.CreateRequest{
		ID: c.spec.ID, Spec: c.oci(), LogPath: c.spec.LogPath, LogDir: logs,
		Stdin: config.GetStdin(), StdinOnce: config.GetStdinOnce(), TTY: config.GetTty(), Runtime: runtime,
	}
	_, err = s.deps.Containers.Create(ctx, request)
	if errors.Is(err, ctr.ErrExists) {
		// A daemon that died has asked for it, and the keeper was still at work when this one took over. Nobody has let
		// it run; the deletion waits until it is made.
		if err = s.deps.Containers.Delete(ctx, c.spec.ID); err == nil {
			_, err = s.deps.Containers.Create(ctx, request)
		}
	}
	if err != nil {
		return ctr.State{}, err
	}
	return s.deps.Containers.Start(ctx, c.spec.ID)
}
