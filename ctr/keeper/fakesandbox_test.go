package keeper_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// sandboxesArg makes this binary, executed again, a runtime whose containers live in their pod's sandbox. It is small,
// but it works: its sandbox is a process that does nothing; a container is a process in the root directory of its
// bundle, kept by a monitor that ends it with its sandbox.
const sandboxesArg = "sandboxes"

// sandboxes is one run of it. State is files: ROOT/ID.{bundle,sandbox,pid,exit}.
type sandboxes struct {
	root                                 string
	bundle, pidFile, process, insideFile string
	pid                                  int
	late                                 bool // it kills what has just ended by itself, and is slow to tell so
}

func runSandboxes(args []string) error {
	var s sandboxes
	global := flag.NewFlagSet("sandboxes", flag.ExitOnError)
	global.StringVar(&s.root, "root", "", "")
	global.BoolVar(&s.late, "late", false, "")
	log := global.String("log", "/dev/null", "")
	global.String("log-format", "", "")
	_ = global.Parse(args)
	command := flag.NewFlagSet(global.Arg(0), flag.ExitOnError)
	command.StringVar(&s.bundle, "bundle", "", "")
	command.StringVar(&s.pidFile, "pid-file", "", "")
	command.StringVar(&s.process, "process", "", "")
	command.StringVar(&s.insideFile, "internal-pid-file", "", "")
	command.IntVar(&s.pid, "pid", 0, "")
	for _, name := range []string{"detach", "force", "all"} {
		command.Bool(name, false, "")
	}
	_ = command.Parse(global.Args()[1:])
	do, ok := map[string]func(...string) error{"create": s.create, "start": s.start, "exec": s.exec, "wait": s.wait, "kill": s.kill,
		"delete": s.delete, "monitor": s.monitor, "monitor-exec": s.monitorExec}[command.Name()]
	if !ok {
		return fmt.Errorf("no command %q", command.Name())
	}
	err := do(command.Args()...)
	if err != nil {
		line, _ := json.Marshal(map[string]string{"level": "error", "msg": err.Error()})
		_ = os.WriteFile(*log, line, 0o600)
	}
	return err
}

func (s *sandboxes) file(id, kind string) string { return filepath.Join(s.root, id+"."+kind) }

func (s *sandboxes) read(id, kind string) string {
	raw, _ := os.ReadFile(s.file(id, kind))
	return string(raw)
}

func (s *sandboxes) spec(id string) (spec specs.Spec, err error) {
	raw, err := os.ReadFile(filepath.Join(s.read(id, "bundle"), "config.json"))
	if err == nil {
		err = json.Unmarshal(raw, &spec)
	}
	return spec, err
}

// self starts this runtime again for another command, in the background.
func (s *sandboxes) self(args ...string) error {
	cmd := exec.Command("/proc/self/exe", append([]string{sandboxesArg, "--root", s.root, fmt.Sprintf("--late=%t", s.late)}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

func (s *sandboxes) create(id ...string) error {
	if err := errors.Join(os.MkdirAll(s.root, 0o700), os.WriteFile(s.file(id[0], "bundle"), []byte(s.bundle), 0o600)); err != nil {
		return err
	}
	spec, err := s.spec(id[0])
	if err != nil {
		return err
	}
	sandbox := spec.Annotations["io.kubernetes.cri.sandbox-id"]
	if err := os.WriteFile(s.file(id[0], "sandbox"), []byte(sandbox), 0o600); err != nil {
		return err
	}
	if spec.Annotations["io.kubernetes.cri.container-type"] == "container" {
		return nil
	}
	cmd := exec.Command("sleep", "100000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := []byte(strconv.Itoa(cmd.Process.Pid))
	return errors.Join(os.WriteFile(s.file(id[0], "pid"), pid, 0o600), os.WriteFile(s.pidFile, pid, 0o600))
}

func (s *sandboxes) start(id ...string) error {
	if s.read(id[0], "sandbox") == id[0] {
		return nil
	}
	if err := s.self("monitor", id[0]); err != nil {
		return err
	}
	return await(func() bool { return s.read(id[0], "pid") != "" })
}

func await(ok func() bool) error {
	for range 1000 {
		if ok() {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.New("it has not come about within five seconds")
}

// launch starts a process in the container's root directory.
func (s *sandboxes) launch(id string, p *specs.Process) (*exec.Cmd, error) {
	spec, err := s.spec(id)
	if err != nil {
		return nil, err
	}
	program := p.Args[0]
	if !strings.Contains(program, "/") {
		program = "/bin/" + program
	}
	cmd := &exec.Cmd{Path: program, Args: p.Args, Env: p.Env, Dir: "/", Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		SysProcAttr: &syscall.SysProcAttr{Chroot: spec.Root.Path, Setsid: true}}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // a sandbox takes all with it
		for alive(s.read(s.read(id, "sandbox"), "pid")) {
			time.Sleep(5 * time.Millisecond)
		}
		_ = cmd.Process.Kill()
	}()
	return cmd, nil
}

func alive(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	return pid != "" && err == nil && !strings.Contains(string(stat), ") Z ")
}

func exitStatus(cmd *exec.Cmd) int {
	_ = cmd.Wait()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

func (s *sandboxes) monitor(id ...string) error {
	spec, err := s.spec(id[0])
	if err != nil {
		return err
	}
	cmd, err := s.launch(id[0], spec.Process)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.file(id[0], "pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		return err
	}
	code := exitStatus(cmd)
	if !alive(s.read(s.read(id[0], "sandbox"), "pid")) {
		return nil // nobody is left to tell
	}
	temp := s.file(id[0], "exit") + ".tmp"
	return errors.Join(os.WriteFile(temp, []byte(strconv.Itoa(code)), 0o600), os.Rename(temp, s.file(id[0], "exit")))
}

func (s *sandboxes) exec(id ...string) error {
	if err := s.self("monitor-exec", "--process", s.process, "--pid-file", s.pidFile, "--internal-pid-file", s.insideFile, id[0]); err != nil {
		return err
	}
	return await(func() bool { raw, _ := os.ReadFile(s.pidFile); return len(raw) > 0 })
}

func (s *sandboxes) monitorExec(id ...string) error {
	raw, err := os.ReadFile(s.process)
	if err != nil {
		return err
	}
	var p specs.Process
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	cmd, err := s.launch(id[0], &p)
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(s.insideFile, []byte(strconv.Itoa(cmd.Process.Pid)), 0o600),
		os.WriteFile(s.pidFile, []byte(strconv.Itoa(os.Getpid())), 0o600)); err != nil {
		return err
	}
	code := exitStatus(cmd)
	s.dawdle()
	os.Exit(code)
	return nil
}

func (s *sandboxes) wait(id ...string) error {
	for s.read(id[0], "exit") == "" {
		if !alive(s.read(s.read(id[0], "sandbox"), "pid")) {
			return errors.New("the sandbox is gone")
		}
		time.Sleep(5 * time.Millisecond)
	}
	s.dawdle()
	_, err := fmt.Printf(`{"id":%q,"exitStatus":%s}`+"\n", id[0], s.read(id[0], "exit"))
	return err
}

func (s *sandboxes) dawdle() {
	if s.late {
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *sandboxes) kill(args ...string) error {
	pid := s.pid
	if pid == 0 {
		var err error
		if pid, err = strconv.Atoi(s.read(args[0], "pid")); err != nil {
			return err
		}
	}
	sig, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if s.late {
		ended := func() bool { return !alive(strconv.Itoa(pid)) && (s.pid != 0 || s.read(args[0], "exit") != "") }
		if err := errors.Join(syscall.Kill(pid, syscall.SIGUSR1), await(ended)); err != nil {
			return err
		}
	}
	return syscall.Kill(pid, syscall.Signal(sig))
}

func (s *sandboxes) delete(id ...string) error {
	for _, kind := range []string{"bundle", "sandbox", "pid", "exit"} {
		if err := os.Remove(s.file(id[0], kind)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
