package keeper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// programTimeout bounds one run of a runtime program, which takes milliseconds, or tenths of seconds where a sandbox
// is made.
const programTimeout = time.Minute

var runCount atomic.Uint64

// run is one run of a runtime program: PATH ARGS... --root DIR --log FILE --log-format json COMMAND args....
type run struct {
	program *program
	number  uint64 // tells its files from those of other runs
	command string
	args    []string
	pid     int // of the program, of a command that leaves a process behind
}

func (p *program) prepare(command string) *run {
	return &run{program: p, number: runCount.Add(1), command: command}
}

func (r *run) name() string { return r.program.runtime.Path + " " + r.command }

// file names a file of this run in the bundle.
func (r *run) file(kind string) string {
	return filepath.Join(r.program.bundle, fmt.Sprintf("%s-%d", kind, r.number))
}

// commandLine is that of the program for one command and its arguments.
func (p *program) commandLine(log, command string, args []string) []string {
	return slices.Concat([]string{p.runtime.Path}, p.runtime.Args,
		[]string{"--root", p.keeper.programState(), "--log", log, "--log-format", "json", command}, args)
}

// do runs a command that starts nothing to its end. What it says on stderr counts where its log says nothing.
func (r *run) do(ctx context.Context) error {
	said, err := os.OpenFile(r.file("err"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("run %s: %w", r.name(), err)
	}
	defer os.Remove(said.Name())
	defer said.Close()
	return r.execute(ctx, ends{stdStreams: stdStreams{stderr: said}, said: said}, r.await)
}

// making runs a command that leaves a process behind, for whose pid the caller holds the reaper off.
func (r *run) making(s ends) error {
	return r.execute(context.Background(), s, func(cmd *exec.Cmd) error {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // see endStrays
		if err := startInView(cmd); err != nil {
			return err
		}
		r.pid = cmd.Process.Pid
		return cmd.Wait()
	})
}

// endStrays ends what a failed run has left and what has not become another program yet, which keeps the command line
// with the run's own log; and hooks, which are in the program's kernel session.
func (r *run) endStrays() error {
	log := []byte("\x00" + r.file("log") + "\x00")
	err := killUntilNone(func() ([]proc, error) {
		all, err := allProcs()
		_, rerr := readProc(r.pid)
		sessions := r.pid != 0 && rerr != nil // else the number has become another's
		return family(all, func(p proc) bool {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid)) // ended meanwhile, at worst
			return sessions && p.session == r.pid || bytes.Contains(line, log)
		}), err
	}, r.program.keeper.children.reap)
	if err != nil {
		return fmt.Errorf("end what is left of %s: %w", r.name(), err)
	}
	return nil
}

// await leaves the reaper at work: what the program deletes may be waiting to be reaped, and the program for that.
func (r *run) await(cmd *exec.Cmd) (err error) {
	return r.program.keeper.children.runToEnd(cmd, func() error { return startInView(cmd) })
}

// execute runs the program by toItsEnd. What it starts inherits the streams; so it complains by a log of its own.
func (r *run) execute(ctx context.Context, s ends, toItsEnd func(*exec.Cmd) error) error {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	log := r.file("log")
	defer os.Remove(log)
	line := r.program.commandLine(log, r.command, r.args)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = programEnv()
	// A nil *os.File in an interface would not be nil, which is /dev/null.
	if s.stdin != nil {
		cmd.Stdin = s.stdin
	}
	if s.stdout != nil {
		cmd.Stdout = s.stdout
	}
	if s.stderr != nil {
		cmd.Stderr = s.stderr
	}
	err := toItsEnd(cmd)
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("run %s: it has not ended within %s: killed", r.name(), programTimeout)
	case ctx.Err() != nil:
		return fmt.Errorf("run %s: its init process is dead", r.name())
	}
	return fmt.Errorf("run %s: %w", r.name(), complaint(log, s.said, err))
}

// withTerminal runs the program for a container or a process that gets s, and returns the master of its terminal,
// where it has one.
func (r *run) withTerminal(s ends, args ...string) (*os.File, error) {
	if !s.tty {
		r.args = append(r.args, args...)
		return nil, r.making(s)
	}
	// Short, as the names of sockets are (unix(7): 108 bytes).
	path := filepath.Join(r.program.keeper.recordDir(), fmt.Sprintf("t%d", r.number))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the terminal: %w", err)
	}
	defer l.Close() // and the socket goes
	r.args = append(append(r.args, "--console-socket", path), args...)
	if err := r.making(ends{}); err != nil {
		return nil, err
	}
	// It has been sent, or never will be.
	if err := l.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return nil, fmt.Errorf("await the terminal: %w", err)
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("await the terminal: %w", err)
	}
	defer conn.Close()
	socket, err := conn.File()
	if err != nil {
		return nil, fmt.Errorf("await the terminal: %w", err)
	}
	defer socket.Close()
	return receiveConsole(socket)
}

// programEnv is the keeper's environment without what a runtime would take for its own (sd_notify(3), sd_listen_fds(3)).
func programEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "NOTIFY_SOCKET" || strings.HasPrefix(name, "LISTEN_")
	})
}

// complaint makes one sentence of a failed run: the last error of its log, else the last line that it wrote to stderr,
// else how it ended.
func complaint(log string, said *os.File, end error) error {
	raw, err := os.ReadFile(log)
	if err == nil {
		if text := lastError(raw); text != "" {
			return errors.New(text)
		}
	}
	if said != nil {
		if text := lastLine(readWhatIsThere(said)); text != "" {
			return errors.New(text)
		}
	}
	return end
}

// lastError reads a log of JSON objects, with or without newlines between them (gVisor's): the last message of level
// error, else the last of all. What is no JSON is a message by itself.
func lastError(raw []byte) string {
	var last, lastAny string
	for line := range bytes.Lines(raw) {
		for d := json.NewDecoder(bytes.NewReader(line)); ; {
			var entry struct{ Msg, Level string }
			err := d.Decode(&entry)
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				lastAny = string(line)
				break
			}
			if lastAny = entry.Msg; entry.Level == "error" || entry.Level == "fatal" {
				last = entry.Msg
			}
		}
	}
	if last == "" {
		last = lastAny
	}
	return strings.TrimSpace(last)
}

func lastLine(raw []byte) string {
	text := strings.TrimSpace(string(raw))
	return strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:])
}

// readWhatIsThere reads, without waiting, the end of a file or what is in a pipe, 4 KiB at most.
func readWhatIsThere(f *os.File) []byte {
	buf := make([]byte, 4096)
	n := 0
	_ = control(f, func(fd int) (err error) {
		if info, serr := f.Stat(); serr == nil && info.Mode().IsRegular() {
			n, err = unix.Pread(fd, buf, max(0, info.Size()-int64(len(buf))))
			return err
		}
		n, err = unix.Read(fd, buf) // the keeper's ends do not block
		return err
	})
	return buf[:max(0, n)]
}

// takes tells whether the command knows an option, by its own help: there is no other way to learn what a runtime has
// beside the common ones, and an option that it does not know is an error.
func (r *run) takes(option string) bool {
	rt := r.program.runtime
	info, err := os.Stat(rt.Path)
	if err != nil {
		return false // the run will say so
	}
	key := [3]string{rt.Path + " " + strings.Join(rt.Args, " "), info.ModTime().String(), r.command}
	cache := &r.program.keeper.help
	help, ok := cache.Load(key)
	if !ok {
		ctx, cancel := context.WithTimeout(context.Background(), programTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, rt.Path, append(slices.Clone(rt.Args), r.command, "--help")...)
		cmd.Env, cmd.WaitDelay = programEnv(), time.Second // whatever it starts may hold the pipe
		out, err := cmd.CombinedOutput()
		help = string(out)
		// Some end with an error after having helped. One that did not run or was killed is asked again the next time.
		var exit *exec.ExitError
		if len(out) > 0 && (err == nil || errors.Is(err, exec.ErrWaitDelay) || errors.As(err, &exit) && exit.Exited()) {
			cache.Store(key, help)
		}
	}
	return knows(help.(string), option)
}

// knows tells whether a help text has the option as a word of its own.
func knows(help, option string) bool {
	return slices.ContainsFunc(strings.FieldsFunc(help, func(c rune) bool { return strings.ContainsRune(" \t\n,=[]", c) }),
		func(word string) bool { return word == option })
}

// startInView starts a program that has to do with cgroups. crun looks at /sys/fs/cgroup and refuses a hybrid of both
// versions, of which it would use nothing here. So where the node has no tree of its own there, the program sees the
// cgroup2 tree in its place: in a mount namespace of its own, which shares all other mounts with the node's.
func startInView(cmd *exec.Cmd) error {
	if cgroups.IsCgroup2UnifiedMode() {
		return cmd.Start()
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and its mounts end with the goroutine
		err := makeView()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	return <-started
}

func makeView() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	// Private: what is mounted on it is not to come out.
	if err := unix.Mount("", cgroupRoot, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %s private: %w", cgroupRoot, err)
	}
	if err := unix.Mount("cgroup2", cgroupRoot, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroup2 for the runtime: %w", err)
	}
	return nil
}
