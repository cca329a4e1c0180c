package pod

import (
	"context"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
)

// Handler is an OCI runtime program that serves the pods of one runtime handler. The default handler, "", is libcontainer
// in the keeper and has none.
type Handler struct {
	Path string   `json:"path"` // absolute
	Args []string `json:"args,omitempty"`
	// Sandbox: the program puts the containers of a pod into one sandbox, that of the pod's pause process, as gVisor
	// does.
	Sandbox bool `json:"sandbox,omitempty"`
	// Facts are what the program says of itself. Without a version it did not answer when it was asked, and is asked again
	// when a pod wants it: it may be just being replaced.
	Facts ctr.RuntimeFacts `json:"facts"`
}

// handlers are those of the configuration.
type handlers struct {
	mu     sync.Mutex // guards byName
	byName map[string]Handler
}

func (x *handlers) get(name string) (Handler, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	h, ok := x.byName[name]
	return h, ok
}

func (x *handlers) put(name string, h Handler) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.byName[name] = h
}

// all returns a copy.
func (x *handlers) all() map[string]Handler {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.byName)
}

// The annotations by which gVisor tells a sandbox from the containers in it.
const (
	annotationType    = "io.kubernetes.cri.container-type"
	annotationSandbox = "io.kubernetes.cri.sandbox-id"
)

// checkHandler refuses a handler that no pod can have now: "If the runtime handler is unknown, this request should be
// rejected" (CRI).
func (s *Service) checkHandler(ctx context.Context, name string) (Handler, error) {
	if name == "" {
		return Handler{}, nil
	}
	h, ok := s.handlers.get(name)
	if !ok {
		return h, invalid("run pod: runtime handler %q is not configured; %s", name, s.handlerNames())
	}
	path, err := exec.LookPath(h.Path)
	if err == nil && h.Facts.Version == "" {
		h.Path = path
		if h.Path, err = filepath.Abs(path); err == nil {
			h.Facts, err = ctr.AskRuntime(ctx, h.Path, h.Args)
		}
		if err == nil {
			s.handlers.put(name, h)
		}
	}
	if err != nil {
		return h, wrongState("run pod: runtime handler %q: %v; `coracle doctor` checks the programs of all handlers", name, err)
	}
	return h, nil
}

func (s *Service) handlerNames() string {
	names := append([]string{"the default one (no name)"}, slices.Sorted(maps.Keys(s.handlers.all()))...)
	return "there are " + strings.Join(names, ", ")
}

// runtimeOf is the program that makes a process of the pod: its pause process, or a container. nil is libcontainer.
// A pod's handler may have been taken out of the configuration since the pod was run.
func (s *Service) runtimeOf(p *pod, pause bool) (*ctr.Runtime, error) {
	if p.spec.Handler == "" || pause && !p.spec.Sandboxed {
		return nil, nil
	}
	h, ok := s.handlers.get(p.spec.Handler)
	if !ok {
		return nil, wrongState("runtime handler %q of pod %s is not configured any more (%s): put it back, or remove the pod",
			p.spec.Handler, p.spec.ID, s.handlerNames())
	}
	rt := &ctr.Runtime{Path: h.Path, Args: h.Args}
	if p.spec.Sandboxed && !pause {
		rt.Sandbox = p.spec.ID
	}
	return rt, nil
}

// annotate tells a runtime that has sandboxes what the spec is of, and the hostname: it does not look into the UTS
// namespace of the pod.
func (p *pod) annotate(spec *specs.Spec, kind string) {
	if p.spec.Sandboxed {
		spec.Annotations = map[string]string{annotationType: kind, annotationSandbox: p.spec.ID}
		spec.Hostname = p.spec.Hostname
	}
}

// recursive are the mount options that a runtime may not know; one that does not know them leaves them out in silence.
var recursive = []string{"rro", "rnoexec", "rnodev", "rnosuid", "rnosymfollow"}

// checkSupport refuses what the pod's runtime does not say that it can do.
func (s *Service) checkSupport(p *pod, config *runtimeapi.ContainerConfig, spec *specs.Spec) error {
	name := p.spec.Handler
	if name == "" {
		return nil
	}
	if _, err := s.runtimeOf(p, false); err != nil {
		return err
	}
	h, _ := s.handlers.get(name)
	lacks := func(where, what string) error {
		return wrongState("%s: runtime handler %q does not say that it knows %s (`%s features`), and might leave it out in silence; "+
			"the default handler knows it", where, name, what, h.Path)
	}
	images := map[string]bool{}
	for _, m := range config.GetMounts() {
		images[filepath.Clean(m.GetContainerPath())] = m.GetImage().GetImage() != "" // nothing is mounted in one
	}
	for _, m := range spec.Mounts { // those of CDI devices, too
		for _, o := range m.Options {
			if slices.Contains(recursive, o) && !images[m.Destination] && !slices.Contains(h.Facts.MountOptions, o) {
				return lacks("mount "+m.Destination, "the mount option "+o)
			}
		}
	}
	if spec.Linux.Seccomp != nil && !h.Facts.Seccomp {
		return lacks("seccomp profile", "seccomp")
	}
	if spec.Process.ApparmorProfile != "" && !h.Facts.AppArmor {
		return lacks("apparmor profile", "AppArmor")
	}
	if p.spec.Sandboxed && config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_TARGET {
		return wrongState("pid namespace mode TARGET: the containers of runtime handler %q live in a sandbox, where they have no "+
			"processes that the node could name; use mode POD", name)
	}
	return nil
}

// runtimeHandlers lists the handlers for Status, the default one first.
func (s *Service) runtimeHandlers() []*runtimeapi.RuntimeHandler {
	out := []*runtimeapi.RuntimeHandler{{Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}}}
	all := s.handlers.all()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		out = append(out, &runtimeapi.RuntimeHandler{Name: name, Features: &runtimeapi.RuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: slices.Contains(all[name].Facts.MountOptions, "rro")}})
	}
	return out
}
