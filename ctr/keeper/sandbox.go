package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// sandboxed is a container in another one's sandbox, as gVisor has them: its processes are no processes of the node's
// kernel, and the program names that of the sandbox for each. A stand-in takes the place of the init process: a child
// of the keeper that waits for the start, then becomes the program's "wait", which ends with the container and prints
// its exit code.
type sandboxed struct {
	program *program

	mu      sync.Mutex
	streams stdStreams // for start: the program hands them to the sandbox then
	gate    *os.File   // opens for the stand-in by one byte
	standIn *process
	started bool

	ended chan struct{} // closed when the stand-in has ended and its status is taken
}

// endGrace is how long one waits, after a signal that the program could not send, for what it was meant for to prove dead:
// it may have come to its end by itself just before, and is about to tell its exit code.
const endGrace = 500 * time.Millisecond

// closedWithin tells whether ended is closed before the time is over.
func closedWithin(ended <-chan struct{}, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-ended:
		return true
	case <-timer.C:
	}
	select {
	case <-ended:
		return true
	default:
		return false
	}
}

// standInArg makes the keeper's program a stand-in: PROGRAM standInArg COMMAND ARG...
const standInArg = "stand-in"

// standIn waits for its start on descriptor 3, then executes what it stands for.
func standIn(args []string) {
	gate := os.NewFile(3, "gate")
	if n, _ := gate.Read(make([]byte, 1)); n == 1 && len(args) > 0 {
		unix.CloseOnExec(3)
		err := unix.Exec(args[0], args, os.Environ())
		fmt.Fprintln(os.Stderr, "execute", args[0]+":", err)
	}
	os.Exit(1) // the container was given up before its start
}

func (m *sandboxed) file(name string) string { return filepath.Join(m.program.bundle, name) }

func (m *sandboxed) create(r *run, s ends) (_ child, err error) {
	tty, err := r.withTerminal(s, m.program.id)
	if err != nil {
		return child{}, err
	}
	defer func() {
		if err != nil {
			wire.CloseFiles([]*os.File{tty})
			m.close()
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.streams, err = s.duplicate(); err != nil {
		return child{}, err
	}
	if err := m.stand(); err != nil {
		return child{}, err
	}
	c := m.child(m.standIn.pid)
	c.tty = tty
	return c, nil
}

// result is the file into which the stand-in writes the exit code.
func (m *sandboxed) result() string { return m.file("exit") }

// child is the stand-in with that pid.
func (m *sandboxed) child(pid int) child {
	wait := waitStatus(pid)
	collect := func() (int, error) {
		status, werr := wait()
		m.standIn.close()
		close(m.ended)
		var exit struct{ ExitStatus int }
		raw, err := os.ReadFile(m.result())
		if err == nil {
			err = json.Unmarshal(raw, &exit)
		}
		if err == nil {
			return exit.ExitStatus, nil
		}
		if werr == nil && status.Signaled() {
			return exitCode(status), nil
		}
		if werr == nil {
			werr = fmt.Errorf("its stand-in ended with code %d", status.ExitStatus())
		}
		return lostExitCode, fmt.Errorf("await container in its sandbox: %w", complaint(m.file("wait.log"), nil, errors.Join(werr, err)))
	}
	return child{pid: pid, collect: collect, signal: m.signal}
}

// stand starts the stand-in, which writes the result into a file.
func (m *sandboxed) stand() error {
	out, err := os.OpenFile(m.result(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("make file for the exit code: %w", err)
	}
	defer out.Close()
	theirs, ours, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make gate: %w", err)
	}
	defer theirs.Close()
	line := m.program.commandLine(m.file("wait.log"), "wait", []string{m.program.id})
	cmd := exec.Command("/proc/self/exe", append([]string{standInArg}, line...)...)
	cmd.Env, cmd.Stdout, cmd.ExtraFiles = programEnv(), out, []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start stand-in: %w", err), ours.Close())
	}
	if m.standIn, err = openProcess(cmd.Process.Pid); err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait(), ours.Close())
	}
	m.gate = ours
	return cmd.Process.Release() // it is waited for by its pid, see child
}

// start holds no lock while the program runs: a container whose start hangs can be killed.
func (m *sandboxed) start(ctx context.Context, r *run) error {
	m.mu.Lock()
	streams := m.streams
	m.streams = stdStreams{}
	m.mu.Unlock()
	defer streams.close()
	if err := r.execute(ctx, ends{stdStreams: streams}, r.await); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gate == nil {
		return errors.New("it was given up before its start")
	}
	_, err := m.gate.Write([]byte{1})
	err = errors.Join(err, m.gate.Close())
	if m.gate = nil; err != nil {
		return fmt.Errorf("let the stand-in go on: %w", err)
	}
	m.started = true
	return nil
}

// signal has the program signal the container's processes. What has not been started has none.
func (m *sandboxed) signal(sig syscall.Signal, all bool) error {
	m.mu.Lock()
	started, standIn := m.started, m.standIn
	m.mu.Unlock()
	var err error
	if started {
		var options []string
		if all {
			options = []string{"--all"}
		}
		if err = m.program.signal(sig, options...); err == nil || closedWithin(m.ended, endGrace) {
			return nil
		}
	}
	if sig != syscall.SIGKILL {
		return err
	}
	// It has not been started, or its sandbox is gone or is going to be: the end must be seen all the same.
	m.close()
	if kerr := standIn.signal(syscall.SIGKILL); kerr != nil {
		return errors.Join(err, kerr)
	}
	return nil
}

// close gives up what is kept for the start.
func (m *sandboxed) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.streams.close()
	wire.CloseFiles([]*os.File{m.gate})
	m.streams, m.gate = stdStreams{}, nil
}

// duplicate makes descriptors that outlive those of s.
func (s stdStreams) duplicate() (d stdStreams, err error) {
	for _, f := range []struct {
		from *os.File
		to   **os.File
	}{{s.stdin, &d.stdin}, {s.stdout, &d.stdout}, {s.stderr, &d.stderr}} {
		if f.from == nil {
			continue
		}
		err := control(f.from, func(fd int) error {
			n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
			if err == nil {
				*f.to = os.NewFile(uintptr(n), f.from.Name())
			}
			return err
		})
		if err != nil {
			d.close()
			return stdStreams{}, fmt.Errorf("duplicate descriptor: %w", err)
		}
	}
	return d, nil
}

// handsOver tells whether another keeper could go on with the container: what waits for its start has streams and a gate
// that only this one has.
func (m *sandboxed) handsOver(c *container) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.started || c.snapshot().Exited()
}
