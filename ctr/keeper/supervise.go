package keeper

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// A daemon that was steady is replaced at once; one that was not, after a back-off between these.
	backoffMin = 100 * time.Millisecond
	backoffMax = 800 * time.Millisecond // a node's users wait no longer than about a second, whatever became of its daemon
	// steadyAfter is how long a daemon must have been up for its next end to count as a first one.
	steadyAfter = 10 * time.Second
	// daemonStop bounds how long a daemon may take to end in good order.
	daemonStop = 10 * time.Second
)

// superviseDaemon keeps the daemon running until ctx ends, then ends it. States of the supervised process:
//
//	starting ---> up --(it ends, with whatever code)--> waiting --(back-off)--> starting
//	               '--(ctx ends)--> stopping: SIGTERM, SIGKILL after daemonStop
func (k *Keeper) superviseDaemon(ctx context.Context) {
	if len(k.cfg.Daemon) == 0 {
		return
	}
	var wait time.Duration
	for ctx.Err() == nil {
		begun := time.Now()
		err := k.runDaemon(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) >= steadyAfter {
			wait = 0
		}
		k.log.Error("the daemon has ended; containers go on; it is started again",
			"cause", err, "was_up", time.Since(begun).Round(time.Millisecond), "wait", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(max(2*wait, backoffMin), backoffMax)
	}
}

// runDaemon starts the daemon, with the keeper's environment and output, and returns how it ended, never nil.
func (k *Keeper) runDaemon(ctx context.Context) error {
	cmd := exec.Command(k.cfg.Daemon[0], k.cfg.Daemon[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	pid, err := k.children.launch(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	})
	if err != nil {
		return err
	}
	k.log.Info("daemon started", "pid", pid)
	p, err := openProcess(pid)
	if err != nil {
		_ = cmd.Process.Kill() // nothing can be known of it
		k.children.collect(pid, func() { _ = cmd.Wait() })
		return err
	}
	defer p.close()
	ended := make(chan error, 1)
	go func() { ended <- p.await() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		err = k.stopDaemon(p, ended)
	}
	k.children.collect(pid, func() { _ = cmd.Wait() }) // its error is the state's
	return errors.Join(err, errors.New(cmd.ProcessState.String()))
}

// stopDaemon asks the daemon to end, and ends it when it does not.
func (k *Keeper) stopDaemon(p *process, ended <-chan error) error {
	if err := p.signal(unix.SIGTERM); err != nil {
		k.log.Error("stop the daemon", "error", err)
	}
	timer := time.NewTimer(daemonStop)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
	}
	k.log.Error("the daemon does not end in time: it is killed", "timeout", daemonStop)
	if err := p.signal(unix.SIGKILL); err != nil {
		k.log.Error("kill the daemon", "error", err)
	}
	return <-ended
}
