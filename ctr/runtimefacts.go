package ctr

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// RuntimeFacts are what an OCI runtime program says of itself.
type RuntimeFacts struct {
	// Version is the first line of what it answers to --version; "" where it gave no answer.
	Version string `json:"version"`
	// MountOptions are those that it knows, by its command "features"; none where it has no such command.
	MountOptions []string `json:"mountOptions,omitempty"`
	// Seccomp and AppArmor: it says that it applies such profiles, in its features or, as crun does, in its version. One
	// that says nothing may leave them out in silence.
	Seccomp  bool `json:"seccomp,omitempty"`
	AppArmor bool `json:"appArmor,omitempty"`
}

// runtimeTimeout bounds one question to a runtime program.
const runtimeTimeout = 10 * time.Second

// AskRuntime asks the program at path, with args before its command, for its version and its features. A program that
// has no command "features" is no error: most are older than that command. One that does not answer to --version is.
func AskRuntime(ctx context.Context, path string, args []string) (RuntimeFacts, error) {
	out, err := ask(ctx, path, args, "--version")
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if err == nil && line == "" {
		err = errors.New("it says nothing")
	}
	if err != nil {
		return RuntimeFacts{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	words := strings.Fields(string(out))
	facts := RuntimeFacts{Version: line, Seccomp: slices.Contains(words, "+SECCOMP"), AppArmor: slices.Contains(words, "+APPARMOR")}
	if out, err = ask(ctx, path, args, "features"); err != nil {
		return facts, nil
	}
	var f features.Features
	if err := json.Unmarshal(out, &f); err != nil {
		return facts, nil // another command of that name
	}
	facts.MountOptions = f.MountOptions
	facts.Seccomp, facts.AppArmor = false, false
	if f.Linux != nil && f.Linux.Seccomp != nil && f.Linux.Seccomp.Enabled != nil {
		facts.Seccomp = *f.Linux.Seccomp.Enabled
	}
	if f.Linux != nil && f.Linux.Apparmor != nil && f.Linux.Apparmor.Enabled != nil {
		facts.AppArmor = *f.Linux.Apparmor.Enabled
	}
	return facts, nil
}

func ask(ctx context.Context, path string, args []string, command string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runtimeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, append(append([]string{}, args...), command)...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &complaint, time.Second
	// crun makes its state directory there at any command, and nobody would remove it.
	state, err := os.MkdirTemp("", "coracle-ask-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(state)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+state)
	err = cmd.Run()
	if err != nil && complaint.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return out.Bytes(), err
}
