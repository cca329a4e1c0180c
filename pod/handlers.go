package pod

import (
	"maps"
	"os/exec"
	"slices"
	"strings"

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
	// Facts are what the program says of itself.
	Facts ctr.RuntimeFacts `json:"facts"`
}

// The annotations by which gVisor tells a sandbox from the containers in it.
const (
	annotationType    = "io.kubernetes.cri.container-type"
	annotationSandbox = "io.kubernetes.cri.sandbox-id"
)

// checkHandler refuses a handler that no pod can have now: "If the runtime handler is unknown, this request should be
// rejected" (CRI).
func (s *Service) checkHandler(name string) error {
	if name == "" {
		return nil
	}
	h, ok := s.cfg.Handlers[name]
	if !ok {
		return invalid("run pod: runtime handler %q is not configured; %s", name, s.handlerNames())
	}
	if _, err := exec.LookPath(h.Path); err != nil {
		return wrongState("run pod: runtime handler %q: %v; `coracle doctor` checks the programs of all handlers", name, err)
	}
	return nil
}

func (s *Service) handlerNames() string {
	names := append([]string{"the default one (no name)"}, slices.Sorted(maps.Keys(s.cfg.Handlers))...)
	return "there are " + strings.Join(names, ", ")
}

// runtimeOf is the program that makes a process of the pod: its pause process, or a container. nil is libcontainer.
// A pod's handler may have been taken out of the configuration since the pod was run.
func (s *Service) runtimeOf(p *pod, pause bool) (*ctr.Runtime, error) {
	if p.spec.Handler == "" || pause && !p.spec.Sandboxed {
		return nil, nil
	}
	h, ok := s.cfg.Handlers[p.spec.Handler]
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
	h := s.cfg.Handlers[name]
	lacks := func(where, what string) error {
		return unsupported("%s: runtime handler %q does not say that it knows %s (`%s features`); the default handler knows it",
			where, name, what, h.Path)
	}
	for _, m := range config.GetMounts() {
		options := slices.Clone(m.GetMountOptions())
		if m.GetRecursiveReadOnly() {
			options = append(options, "rro")
		}
		for _, o := range options {
			if slices.Contains(recursive, o) && !slices.Contains(h.Facts.MountOptions, o) {
				return lacks("mount "+m.GetContainerPath(), "the mount option "+o)
			}
		}
	}
	if h.Facts.NoSeccomp && spec.Linux.Seccomp != nil {
		return lacks("seccomp profile", "seccomp")
	}
	if p.spec.Sandboxed && config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_TARGET {
		return unsupported("pid namespace mode TARGET: the containers of runtime handler %q live in a sandbox, where they have no "+
			"processes that the node could name; use mode POD", name)
	}
	return nil
}

// runtimeHandlers lists the handlers for Status, the default one first.
func (s *Service) runtimeHandlers() []*runtimeapi.RuntimeHandler {
	out := []*runtimeapi.RuntimeHandler{{Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}}}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.Handlers)) {
		out = append(out, &runtimeapi.RuntimeHandler{Name: name, Features: &runtimeapi.RuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: slices.Contains(s.cfg.Handlers[name].Facts.MountOptions, "rro")}})
	}
	return out
}
