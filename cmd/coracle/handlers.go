package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/pod"
)

// handlersHelp documents the section of the file.
const handlersHelp = `handlers
    runtime handlers beside the default one, which needs none; file only. Keys are names for RunPodSandbox (crictl runp
    --runtime NAME; the handler of a Kubernetes RuntimeClass). Each is an OCI runtime with runc's command line:

      handlers:
        crun:
          path: /usr/bin/crun                   # or a name, looked up in PATH
        runsc:
          path: /usr/local/bin/runsc
          args: ["--ignore-cgroups"]            # before each command
          sandbox: true                         # a pod's containers live in one sandbox of the program's, as gVisor's do
`

// handlerConfig is one OCI runtime program.
type handlerConfig struct {
	Path    string   `json:"path"`
	Args    []string `json:"args"`
	Sandbox bool     `json:"sandbox"`
}

// handlerName is what Kubernetes takes for the handler of a RuntimeClass: a DNS label.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// validateHandlers checks the form. Whether the programs are there is for checkHandlers to find out: a daemon whose pods
// go on must start without them.
func validateHandlers(handlers map[string]handlerConfig) error {
	for _, name := range slices.Sorted(maps.Keys(handlers)) {
		h := handlers[name]
		switch {
		case !handlerName.MatchString(name):
			return fmt.Errorf("handlers: %q: a name has 1 to 63 small letters, digits and dashes, no dash at either end", name)
		case h.Path == "":
			return fmt.Errorf("handlers.%s.path: give the path of the runtime's program, or its name", name)
		case strings.Contains(h.Path, "/") && !filepath.IsAbs(h.Path):
			return fmt.Errorf("handlers.%s.path: %q is neither absolute nor a name", name, h.Path)
		}
	}
	return nil
}

// program is the absolute path of the handler's program, which can be executed.
func (h handlerConfig) program() (string, error) {
	path, err := exec.LookPath(h.Path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// checkHandlers finds the program of each handler.
func checkHandlers(handlers map[string]handlerConfig) error {
	var all []error
	for _, name := range slices.Sorted(maps.Keys(handlers)) {
		if _, err := handlers[name].program(); err != nil {
			all = append(all, fmt.Errorf("handlers.%s: %w; install it, or take the handler out of the configuration", name, err))
		}
	}
	return errors.Join(all...)
}

// askHandler asks the program of a handler for its version, and what it can do.
func askHandler(ctx context.Context, h handlerConfig) (string, ctr.RuntimeFacts, error) {
	path, err := h.program()
	if err != nil {
		return h.Path, ctr.RuntimeFacts{}, err
	}
	facts, err := ctr.AskRuntime(ctx, path, h.Args)
	return path, facts, err
}

// podHandlers makes what the CRI service knows of handlers. A program that does not answer now is logged, and asked
// again when a pod wants it.
func podHandlers(ctx context.Context, handlers map[string]handlerConfig, log *slog.Logger) map[string]pod.Handler {
	var mu sync.Mutex
	var asked sync.WaitGroup // side by side: a program that hangs holds up the start of a daemon for its own time only
	out := map[string]pod.Handler{}
	for name, h := range handlers {
		asked.Go(func() {
			path, facts, err := askHandler(ctx, h)
			if err != nil {
				log.Error("runtime handler does not work", "handler", name, "error", err)
			}
			mu.Lock()
			defer mu.Unlock()
			out[name] = pod.Handler{Path: path, Args: h.Args, Sandbox: h.Sandbox, Facts: facts}
		})
	}
	asked.Wait()
	return out
}
