package keeper

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

const (
	// readyTimeout bounds how long a daemon that was asked for may take until it serves.
	readyTimeout = 30 * time.Second
	// tryTimeout bounds the trial of a program, which prints a line and ends.
	tryTimeout = 10 * time.Second
)

// daemon is a daemon that was started.
type daemon struct {
	p     *process
	ready chan string   // one value, what it said: "" where it ended without a word
	ended chan struct{} // closed when end is set
	end   error         // how it ended
}

// restart asks the supervisor for another program.
type restart struct {
	program string
	done    chan error // capacity 1
}

// restartDaemon exchanges the daemon for one that is started from program.
func (k *Keeper) restartDaemon(ctx context.Context, program string) error {
	if !filepath.IsAbs(program) {
		return fmt.Errorf("path %q of the program is not absolute", program)
	}
	if !k.swap.mu.TryLock() {
		return errSwapping
	}
	defer k.swap.mu.Unlock()
	if k.supervisor.program.path == "" {
		return errors.New("this keeper has no daemon")
	}
	if err := k.try(ctx, program, nil, "--version"); err != nil {
		return fmt.Errorf("%w; nothing was changed", err)
	}
	r := restart{program: program, done: make(chan error, 1)}
	select {
	case k.supervisor.restarts <- r:
	case <-k.stopped.Done():
		return errStopping
	}
	return <-r.done
}

// exchange stops the daemon, where one runs, and starts program in its place. Where that does not come to serve, the
// program of before is started again: the file that ran, which may not be at its path any more.
func (k *Keeper) exchange(d *daemon, path string) (*daemon, error) {
	s, before := &k.supervisor, k.supervisor.program
	if d != nil {
		ran, err := os.Open(fmt.Sprintf("/proc/%d/exe", d.p.pid))
		if err != nil {
			return d, fmt.Errorf("hold the daemon's program: %w", err)
		}
		k.log.Info("the daemon is exchanged; containers go on", "before", before.path, "now", path)
		k.stopDaemon(d)
		before.closeFile()
		before.file = ran
	}
	next, err := k.startServing(daemonProgram{path: path})
	if err == nil {
		before.closeFile()
		s.program = daemonProgram{path: path}
		return next, nil
	}
	s.program = before
	if d == nil {
		return nil, fmt.Errorf("%w; before that no daemon ran", err)
	}
	k.log.Error("the new daemon does not serve: the one of before is started again", "program", path, "error", err)
	back, backErr := k.startServing(before)
	if backErr != nil {
		return nil, errors.Join(err, fmt.Errorf("the daemon of before does not serve either, and is tried again: %w", backErr))
	}
	return back, fmt.Errorf("%w; the daemon of before (%s) runs again", err, before.path)
}

func (p daemonProgram) closeFile() {
	if p.file != nil {
		_ = p.file.Close() // read only
	}
}

// startServing starts the daemon and waits until it serves. On an error none is left.
func (k *Keeper) startServing(p daemonProgram) (*daemon, error) {
	d, err := k.startDaemon(p)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.path, err)
	}
	timer := time.NewTimer(readyTimeout)
	defer timer.Stop()
	var said string
	select {
	case said = <-d.ready:
	case <-timer.C:
		said = "it did not serve within " + readyTimeout.String()
	case <-k.stopped.Done():
		said = errStopping.Error()
	}
	if said == wire.ReadyServing {
		return d, nil
	}
	k.stopDaemon(d)
	return nil, fmt.Errorf("start %s: %s", p.path, cmp.Or(said, fmt.Sprintf("it ended without a word: %v", d.end)))
}

// startDaemon starts the daemon, with the keeper's environment and output.
func (k *Keeper) startDaemon(p daemonProgram) (*daemon, error) {
	cmd := exec.Command(p.path, k.supervisor.args...)
	if p.file != nil {
		if err := control(p.file, func(fd int) error {
			cmd.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
			return nil
		}); err != nil {
			return nil, err
		}
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	says, ready, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer ready.Close()
	cmd.ExtraFiles, cmd.Env = []*os.File{ready}, append(os.Environ(), wire.ReadyEnv+"=3")
	d := &daemon{ready: make(chan string, 1), ended: make(chan struct{})}
	pid, err := k.children.launch(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		if d.p, err = openProcess(cmd.Process.Pid); err != nil {
			_ = cmd.Process.Kill() // nothing can be known of it
			return 0, errors.Join(err, cmd.Wait())
		}
		k.setDaemon(d) // while nobody can replace the keeper without it
		return cmd.Process.Pid, nil
	})
	if err != nil {
		return nil, errors.Join(err, says.Close())
	}
	k.log.Info("daemon started", "pid", pid, "program", p.path)
	k.tasks.Go(func() {
		line, _ := bufio.NewReader(says).ReadString('\n')
		d.ready <- strings.TrimSpace(line)
	})
	k.watchDaemon(d, func() string {
		_ = cmd.Wait()   // its error is the state's
		_ = says.Close() // a child of the daemon may hold the other end
		return cmd.ProcessState.String()
	})
	return d, nil
}

func (k *Keeper) setDaemon(d *daemon) {
	k.children.mu.Lock()
	defer k.children.mu.Unlock()
	k.supervisor.running = d
}

// watchDaemon waits for the daemon's end beside the caller. collect takes its status.
func (k *Keeper) watchDaemon(d *daemon, collect func() string) {
	k.tasks.Go(func() {
		err := d.p.await()
		k.swap.ends.enter()
		defer k.swap.ends.leave()
		k.children.collect(d.p.pid, func() {
			err = errors.Join(err, errors.New(collect()))
			if k.supervisor.running == d {
				k.supervisor.running = nil
			}
		})
		d.p.close()
		d.end = err
		close(d.ended)
	})
}

// stopDaemon asks the daemon to end, and ends it when it does not.
func (k *Keeper) stopDaemon(d *daemon) {
	if err := d.p.signal(unix.SIGTERM); err != nil {
		k.log.Error("stop the daemon", "error", err)
	}
	if closedWithin(d.ended, daemonStop) {
		return
	}
	k.log.Error("the daemon does not end in time: it is killed", "timeout", daemonStop)
	if err := d.p.signal(unix.SIGKILL); err != nil {
		k.log.Error("kill the daemon", "error", err)
	}
	<-d.ended
}

// try runs a program that is to end by itself, with input; what it has against it is the error.
func (k *Keeper) try(ctx context.Context, path string, input []byte, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(input), &said
	cmd.WaitDelay = time.Second
	err := k.children.runToEnd(cmd, cmd.Start)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("it does not end: %w", context.Cause(ctx))
	}
	if text := lastLine(said.Bytes()); text != "" {
		err = errors.New(text)
	}
	return fmt.Errorf("try %s: %w", path, err)
}
