package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The kinds of lives.
const (
	ends         = iota // its program logs some lines and ends
	untilStopped        // its program logs until it is asked to end
	untilKilled         // its pod is stopped while it runs
	kinds
)

// life is that of a pod with one container, from its making to its removal, as a kubelet lives it while the daemon dies again
// and again: it looks what there is, and asks for what is not yet so.
type life struct {
	*node
	image, name    string
	kind           int
	pod, container string
}

func (l *life) live() error {
	for _, step := range []func() error{l.ensurePod, l.ensureCreated, l.ensureStarted, l.ensureStarted, l.execute, l.execute, l.end} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// persist makes a call until there is an answer that is not of a daemon that died.
func persist[Request, Answer any](call func(context.Context, Request, ...grpc.CallOption) (Answer, error), request Request) (Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for {
		answer, err := call(ctx, request)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return answer, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// once makes a call, and tells whether a daemon died over it.
func once[Request, Answer any](call func(context.Context, Request, ...grpc.CallOption) (Answer, error), request Request) (died bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	_, err = call(ctx, request, grpc.WaitForReady(true))
	if status.Code(err) == codes.Unavailable {
		return true, nil
	}
	return false, err
}

func (l *life) config() *runtimeapi.PodSandboxConfig {
	config := l.podConfig(l.name)
	config.Labels = map[string]string{"life": l.name}
	return config
}

func (l *life) ensurePod() error {
	for {
		list, err := persist(l.runtime.ListPodSandbox, &runtimeapi.ListPodSandboxRequest{
			Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"life": l.name}}})
		if err != nil {
			return err
		}
		if len(list.Items) > 1 || len(list.Items) == 1 && list.Items[0].State != runtimeapi.PodSandboxState_SANDBOX_READY {
			return fmt.Errorf("there are %d pods, the first is %s", len(list.Items), list.Items[0].State)
		}
		if len(list.Items) == 1 {
			l.pod = list.Items[0].Id
			return nil
		}
		if _, err := once(l.runtime.RunPodSandbox, &runtimeapi.RunPodSandboxRequest{Config: l.config()}); err != nil {
			return err
		}
	}
}

// script logs numbered lines. Each start of it leaves a line in a file.
func (l *life) script() string {
	begin := "echo started >>/traces/" + l.name + "; i=0; trap 'stop=1' TERM; "
	line := "i=$((i+1)); echo $i; usleep 2000; "
	if l.kind == ends {
		return begin + "while [ $i -lt 300 ]; do " + line + "done; exit 9"
	}
	return begin + "while [ -z \"$stop\" ]; do " + line + "done; echo bye; exit 42"
}

func (l *life) ensureCreated() error {
	config := containerConfig("c", l.image, l.script())
	config.Labels = map[string]string{"life": l.name}
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/traces", HostPath: l.path("work")}}
	for {
		list, err := persist(l.runtime.ListContainers, &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{"life": l.name}}})
		if err != nil {
			return err
		}
		if len(list.Containers) > 1 {
			return fmt.Errorf("there are %d containers", len(list.Containers))
		}
		if len(list.Containers) == 1 {
			l.container = list.Containers[0].Id
			return nil
		}
		if _, err := once(l.runtime.CreateContainer, &runtimeapi.CreateContainerRequest{PodSandboxId: l.pod, Config: config, SandboxConfig: l.config()}); err != nil {
			return err
		}
	}
}

func (l *life) status() (*runtimeapi.ContainerStatus, error) {
	answer, err := persist(l.runtime.ContainerStatus, &runtimeapi.ContainerStatusRequest{ContainerId: l.container})
	return answer.GetStatus(), err
}

func (l *life) ensureStarted() error {
	for {
		state, err := l.status()
		if err != nil {
			return err
		}
		if state.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			return nil
		}
		if _, err := once(l.runtime.StartContainer, &runtimeapi.StartContainerRequest{ContainerId: l.container}); err != nil {
			return err
		}
	}
}

// execute runs a command, whose output and exit code are right unless a daemon died over it or the container has ended.
func (l *life) execute() error {
	answer, err := persist(l.runtime.ExecSync, &runtimeapi.ExecSyncRequest{ContainerId: l.container, Cmd: []string{"/bin/sh", "-c", "hostname; exit 5"}})
	if err != nil {
		if l.kind == ends && status.Code(err) == codes.FailedPrecondition {
			return l.endedWith(9) // its process was gone already
		}
		return err
	}
	if string(answer.Stdout) != l.name+"\n" || answer.ExitCode != 5 {
		return fmt.Errorf("a command said %q, %q and ended with %d", answer.Stdout, answer.Stderr, answer.ExitCode)
	}
	return nil
}

// end ends the container in the way of its kind, looks at what it leaves and removes it with its pod.
func (l *life) end() error {
	if err := l.awaitLine("1"); err != nil { // the trap is set
		return err
	}
	var code int32
	var err error
	switch l.kind {
	case ends:
		code = 9
	case untilStopped:
		code = 42
		_, err = persist(l.runtime.StopContainer, &runtimeapi.StopContainerRequest{ContainerId: l.container, Timeout: 60})
	case untilKilled:
		code = 137
		_, err = persist(l.runtime.StopPodSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: l.pod})
	}
	if err != nil {
		return err
	}
	if err := errors.Join(l.endedWith(code), l.startedOnce(), l.logged()); err != nil {
		return err
	}
	if _, err := persist(l.runtime.StopPodSandbox, &runtimeapi.StopPodSandboxRequest{PodSandboxId: l.pod}); err != nil {
		return err
	}
	if _, err := persist(l.runtime.RemoveContainer, &runtimeapi.RemoveContainerRequest{ContainerId: l.container}); err != nil {
		return err
	}
	_, err = persist(l.runtime.RemovePodSandbox, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: l.pod})
	return err
}

func (l *life) endedWith(code int32) error {
	deadline := time.Now().Add(patience)
	for {
		state, err := l.status()
		if err != nil {
			return err
		}
		if state.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			if state.ExitCode != code || state.Reason != "Error" || state.FinishedAt < state.StartedAt || state.StartedAt == 0 {
				return fmt.Errorf("the container ended with code %d, want %d: %s %s", state.ExitCode, code, state.Reason, state.Message)
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the container is %s", state.State)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (l *life) startedOnce() error {
	raw, err := os.ReadFile(l.path("work", l.name))
	if err == nil && string(raw) != "started\n" {
		err = fmt.Errorf("the program was started %d times", strings.Count(string(raw), "started"))
	}
	return errors.Join(err, os.Remove(l.path("work", l.name)))
}

// lines are what the container's log has, without stamps.
func (l *life) lines() ([]string, error) {
	raw, err := os.ReadFile(l.path("work", "logs", l.name, "c.log"))
	var out []string
	for line := range strings.Lines(string(raw)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4) // time, stream, F or P, what was said
		if len(fields) != 4 || fields[1] != "stdout" || fields[2] != "F" {
			return nil, fmt.Errorf("the log has the line %q", line)
		}
		out = append(out, fields[3])
	}
	return out, err
}

func (l *life) awaitLine(want string) error {
	deadline := time.Now().Add(patience)
	for {
		lines, err := l.lines()
		if err == nil && len(lines) > 0 && lines[0] == want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the log does not begin with %s: %q: %w", want, lines[:min(3, len(lines))], err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// logged: every line is there once, in order.
func (l *life) logged() error {
	lines, err := l.lines()
	if err != nil {
		return err
	}
	if l.kind == untilStopped {
		if len(lines) == 0 || lines[len(lines)-1] != "bye" {
			return fmt.Errorf("the log does not end with the program's last word: %q", lines[max(0, len(lines)-3):])
		}
		lines = lines[:len(lines)-1]
	}
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			return fmt.Errorf("line %d of the log is %q", i+1, line)
		}
	}
	if l.kind == ends && len(lines) != 300 {
		return fmt.Errorf("the log has %d lines of 300", len(lines))
	}
	return nil
}
