package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"

	// The cgroup managers apply device rules through this package; without it a start is refused.
	_ "github.com/opencontainers/cgroups/devices"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	// The C constructor that joins and makes namespaces before Go's threads exist.
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// Init turns this process into a container's init when libcontainer has started it as one: it executes this same
// program with the argument "init". Else it returns. Call it from an init function of the main package.
//
// It also keeps the main goroutine on the main thread for good. While it creates a container, libcontainer moves
// a locked thread into the container's mount namespace and lets the thread die there. Go cannot let the main
// thread die; if that is the one, it stays parked in the namespace, which then never goes away, and /proc/self
// shows that instead of the keeper's.
func Init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init() // does not return
	}
	runtime.LockOSThread()
}

// initLogLevel makes libcontainer's init pass its warnings on (logrus counts: 3 is a warning).
const initLogLevel = "3"

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// check refuses what no container can be made of, before anything is touched.
func check(id string, req *wire.Create) error {
	switch {
	case !validID.MatchString(id):
		return fmt.Errorf("id must be 1 to 128 letters, digits, underscores, dots and dashes: %w", wire.ErrBadRequest)
	case req == nil || req.Spec == nil || req.Spec.Process == nil || req.Spec.Root == nil || req.Spec.Linux == nil:
		return fmt.Errorf("spec needs process, root and linux: %w", wire.ErrBadRequest)
	case len(req.Spec.Process.Args) == 0:
		return fmt.Errorf("spec has no command: %w", wire.ErrBadRequest)
	case !slices.Contains(req.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.MountNamespace}):
		// Without one, libcontainer would mount into the keeper's own.
		return fmt.Errorf("spec has no new mount namespace: %w", wire.ErrBadRequest)
	case req.Spec.Hooks != nil && len(req.Spec.Hooks.Poststart)+len(req.Spec.Hooks.Poststop) > 0:
		// The others run inside libcontainer's Start, while the reaper is kept away, or as children of the container's
		// init. A poststop hook would be a child of which the reaper does not know; and as Start is only the creation
		// here, a poststart hook would run before the program.
		return fmt.Errorf("spec has poststart or poststop hooks, which are not run here: %w", wire.ErrBadRequest)
	case req.LogPath != "" && !filepath.IsAbs(req.LogPath):
		return fmt.Errorf("log path %q is not absolute: %w", req.LogPath, wire.ErrBadRequest)
	}
	return nil
}

// newLibcontainer makes libcontainer's container of a spec; no process exists yet.
func newLibcontainer(stateDir, id string, spec *specs.Spec) (*libcontainer.Container, error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: id, Spec: spec,
		// As uid 0 of a user namespace mounts and ids are as for root, but cgroups may be refused: RootlessCgroups
		// lets a spec without a cgroup path and limits do without.
		RootlessEUID: false, RootlessCgroups: true,
		NoNewKeyring: true, // see LeaveKeyring
	})
	if err != nil {
		return nil, fmt.Errorf("convert spec: %w", err)
	}
	bundle := filepath.Join(stateDir, id) // libcontainer's own directory of the container, which goes with it
	config.Labels = append(config.Labels, "bundle="+bundle)
	c, err := libcontainer.Create(stateDir, id, config)
	if errors.Is(err, libcontainer.ErrExist) {
		err = errors.Join(wire.ErrExists, err)
	}
	if err != nil {
		return nil, fmt.Errorf("prepare container: %w", err)
	}
	if spec.Hooks != nil {
		if err := writeBundle(bundle, spec); err != nil {
			return nil, errors.Join(err, c.Destroy())
		}
	}
	return c, nil
}

// writeBundle gives hooks what they find through the state on their standard input: the container's configuration, in
// which they look for its root. Of labels of one name the last counts, so specconv's, the working directory, does not.
func writeBundle(dir string, spec *specs.Spec) error {
	raw, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode bundle: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

// newProcess converts an OCI process to libcontainer's.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	if p == nil || len(p.Args) == 0 {
		return nil, fmt.Errorf("process has no command: %w", wire.ErrBadRequest)
	}
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile, Label: p.SelinuxLabel,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
		LogLevel: initLogLevel,
	}
	if lp.Cwd == "" {
		lp.Cwd = "/"
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	if s := p.ConsoleSize; s != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(s.Width), uint16(s.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{Bounding: c.Bounding, Effective: c.Effective,
			Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient}
	}
	for _, r := range p.Rlimits {
		kind, ok := wire.Rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("unknown resource limit %q: %w", r.Type, wire.ErrBadRequest)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("convert cpu affinity: %w", errors.Join(err, wire.ErrBadRequest))
	}
	lp.CPUAffinity = affinity
	return lp, nil
}
