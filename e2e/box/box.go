package box

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Address is the box's address on its only network, beside 127.0.0.1.
const Address = "198.51.100.10"

// Host says how the machine is to be. The zero value is a good one.
type Host struct {
	NoSubIDs bool              // /etc/subuid and /etc/subgid are empty
	NoTun    bool              // there is no /dev/net/tun
	NoUserns bool              // user.max_user_namespaces is 0
	NoCgroup bool              // cgroup v2 may only be read, as in most containers
	SmallTmp string            // /tmp is a tmpfs of its own, bounded by these options
	Tmp      string            // /tmp is this directory of the host
	Names    map[string]string // what the name server on 127.0.0.53 answers: full name, without the last dot → IPv4 address
	Search   string            // search domain of /etc/resolv.conf

	remove string // for RemoveAll: no machine, only this
}

// The environment of the stages.
const (
	stageEnv  = "CORACLE_BOX_STAGE"
	hostEnv   = "CORACLE_BOX_HOST"
	removeEnv = "CORACLE_BOX_REMOVE"
	entry     = "entry"
	host      = "host"
	inside    = "inside"
)

// Inside tells whether this process runs in a box.
func Inside() bool { return os.Getenv(stageEnv) == inside }

// Init is to be called first in TestMain: in the stages on the way into a box it does their work and ends the process.
func Init() {
	var err error
	switch os.Getenv(stageEnv) {
	case entry:
		err = enter()
	case host:
		err = serveHost()
	default:
		return
	}
	fmt.Fprintln(os.Stderr, "box:", err)
	os.Exit(1)
}

// Run runs the calling test in a box and reports how it ended there. A test uses it so:
//
//	if !box.Inside() { box.Run(t, box.Host{}); return }
func Run(t *testing.T, h Host) {
	t.Helper()
	if err := run(h, only(t)); err != nil {
		t.Fatalf("in the box: %v", err)
	}
}

// only are the arguments with which this program runs one test.
func only(t *testing.T) []string {
	return []string{"-test.run=^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$", "-test.v", "-test.timeout=20m", "-test.count=1"}
}

// RemoveAll removes a directory tree that belongs to the caller and its subordinate ids, as a container's files do.
func RemoveAll(path string) error {
	if err := run(Host{remove: path}, nil); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// run executes this program in a box, with args for it, and waits until the box is gone.
func run(h Host, args []string) error {
	raw, err := json.Marshal(h)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = with(with(with(os.Environ(), stageEnv, entry), hostEnv, string(raw)), removeEnv, h.remove)
	// The capabilities that clone(2) gives in the new user namespace would go at execve(2), because no id is mapped
	// yet: the ambient set keeps the ones that entry needs to become uid 0.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL, AmbientCaps: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID},
	}
	// Pdeathsig is about the thread that forks, and the runtime ends idle ones.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	cmd.ExtraFiles = []*os.File{r}
	copied, err := start(cmd)
	r.Close()
	if err != nil {
		return err
	}
	if err = writeMaps(cmd.Process.Pid); err == nil {
		_, err = w.Write([]byte{0})
	}
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
	}
	err = errors.Join(err, cmd.Wait())
	copied.Wait()
	if err != nil && len(copied.said) > 0 {
		err = fmt.Errorf("%w; the test said there:\n%s", err, strings.Join(copied.said, "\n"))
	}
	return err
}

// output is what comes of a program in a box.
type output struct {
	sync.WaitGroup
	said []string // the last messages of a test, errors and others, each by its first line
}

// mostSaid is how many of them are kept.
const mostSaid = 20

// message is how the package testing begins one, and the runtime its last.
var message = regexp.MustCompile(`^ +\w+\.go:\d+: |^panic: `)

func (o *output) take(line string) {
	fmt.Println("    box |", line)
	if message.MatchString(line) {
		o.said = append(o.said[max(0, len(o.said)-mostSaid+1):], line)
	}
}

// start starts cmd and copies what it prints to this process's output, a word in front of each line so that no line
// of it reads as one of this process's own results.
func start(cmd *exec.Cmd) (*output, error) {
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = in, in
	err = cmd.Start()
	in.Close()
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("clone the box: %w", err)
	}
	copied := &output{}
	copied.Go(func() {
		defer out.Close()
		s := bufio.NewScanner(out)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			copied.take(s.Text())
		}
	})
	return copied, nil
}

// writeMaps maps, with the same numbers: the user, and the subordinate ids; and 0 to the first of those.
func writeMaps(pid int) error {
	for _, m := range []struct {
		tool, file string
		id         int
	}{{"newuidmap", "/etc/subuid", os.Getuid()}, {"newgidmap", "/etc/subgid", os.Getgid()}} {
		first, count, err := SubIDs(m.file)
		if err != nil {
			return err
		}
		args := []string{strconv.Itoa(pid), "0", strconv.Itoa(first), "1", strconv.Itoa(m.id), strconv.Itoa(m.id), "1",
			strconv.Itoa(first + 1), strconv.Itoa(first + 1), strconv.Itoa(count - 1)}
		if out, err := exec.Command(m.tool, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", m.tool, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// SubIDs is the caller's first range in /etc/subuid or /etc/subgid.
func SubIDs(file string) (first, count int, err error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return 0, 0, err
	}
	id := strconv.Itoa(os.Getuid())
	name := id
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) == 3 && (f[0] == name || f[0] == id) {
			first, err1 := strconv.Atoi(f[1])
			count, err2 := strconv.Atoi(f[2])
			return first, count, errors.Join(err1, err2)
		}
	}
	return 0, 0, fmt.Errorf("%s has no range for %s; to add one, run: scripts/setup.sh", file, name)
}

// enter waits for the maps, becomes uid 0 and executes itself, which fills the capability sets.
func enter() error {
	unix.CloseOnExec(3)
	if _, err := io.ReadFull(os.NewFile(3, "maps"), make([]byte, 1)); err != nil {
		return fmt.Errorf("await id maps: %w", err)
	}
	env := os.Environ()
	for _, v := range [][2]string{{stageEnv, host}, {"CORACLE_BOX_UID", strconv.Itoa(os.Getuid())}, {"CORACLE_BOX_GID", strconv.Itoa(os.Getgid())}} {
		env = with(env, v[0], v[1])
	}
	if err := syscall.Setresgid(0, 0, 0); err != nil {
		return fmt.Errorf("become gid 0: %w", err)
	}
	if err := syscall.Setresuid(0, 0, 0); err != nil {
		return fmt.Errorf("become uid 0: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, env)
}

// with replaces a variable: execve(2) passes doubles on, and getenv finds the first.
func with(env []string, key, value string) []string {
	var out []string
	for _, v := range env {
		if !strings.HasPrefix(v, key+"=") {
			out = append(out, v)
		}
	}
	return append(out, key+"="+value)
}
