package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/pod/streaming"
)

// execSyncLimit: "The runtime should cap the output of this response to 16MB." (CVE-2022-1708)
const execSyncLimit = 16 << 20

func (s *Service) execSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	c, err := s.index.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("exec in container %s: the command is empty", c.spec.ID)
	}
	if err := c.requireRunning("exec in"); err != nil {
		return nil, err
	}
	limit := seconds(req.GetTimeout())
	execCtx := ctx
	if limit > 0 {
		var cancel context.CancelFunc
		execCtx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	stdout, stderr := &cappedBuffer{max: execSyncLimit}, &cappedBuffer{max: execSyncLimit}
	code, err := s.capture(execCtx, c, req.GetCmd(), stdout, stderr)
	if limit > 0 && ctx.Err() == nil && errors.Is(execCtx.Err(), context.DeadlineExceeded) && err != nil {
		return nil, timedOut("exec in container %s: %q ran longer than %s and was killed", c.spec.ID, req.GetCmd(), limit)
	}
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.spec.ID, err)
	}
	return &runtimeapi.ExecSyncResponse{Stdout: stdout.kept.Bytes(), Stderr: stderr.kept.Bytes(), ExitCode: int32(code)}, nil
}

// capture runs a command to its end and keeps its output. The end of ctx kills every process of it.
func (s *Service) capture(ctx context.Context, c *container, cmd []string, stdout, stderr io.Writer) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	outR, outW, err := newPipe(true)
	if err != nil {
		return 0, err
	}
	errR, errW, err := newPipe(true)
	if err != nil {
		closeFiles(outR, outW)
		return 0, err
	}
	defer closeFiles(outR, errR)
	session, err := s.deps.Containers.Exec(ctx, ctr.ExecRequest{
		ContainerID: c.spec.ID, Process: ctr.ExecProcess(c.oci(), cmd, false),
		Streams: ctr.Streams{Stdout: outW, Stderr: errW},
	})
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	for _, x := range []struct {
		to   io.Writer
		from *os.File
	}{{stdout, outR}, {stderr, errR}} {
		wg.Go(func() {
			// A buffer does not fail, and a pipe that does has ended. A panic ends the command, whose pipe nobody reads.
			if err := streaming.Guard(func() error { _ = copyOutput(x.to, x.from); return nil }); err != nil {
				cancel(err)
			}
		})
	}
	code, err := session.Wait(ctx)
	err = errors.Join(err, session.Close())
	endOutput(outR, errR)
	wg.Wait()
	if defect := (*streaming.Defect)(nil); errors.As(context.Cause(ctx), &defect) {
		s.cfg.Log.Error("panic", "method", "ExecSync", "reason", defect.Reason, "stack", string(defect.Stack))
		return 0, defect
	}
	return code, err
}

// endOutput gives what is left behind of a process a moment to finish its output.
func endOutput(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.SetReadDeadline(time.Now().Add(outputGrace)) // a file without deadlines ends with its writers
		}
	}
}

func (s *Service) reopenLog(ctx context.Context, id string) error {
	c, err := s.index.container(id)
	if err != nil {
		return err
	}
	if err := c.requireRunning("reopen the log of"); err != nil {
		return err
	}
	p, err := s.index.pod(c.spec.PodID)
	if err != nil {
		return err
	}
	if err := s.deps.Containers.ReopenLog(ctx, c.spec.ID, p.spec.Config.GetLogDirectory()); err != nil {
		return fmt.Errorf("reopen the log of container %s: %w", c.spec.ID, err)
	}
	return nil
}
