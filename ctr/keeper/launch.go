package keeper

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	// The cgroup managers apply device rules through this package; without it a start is refused.
	_ "github.com/opencontainers/cgroups/devices"
	"github.com/opencontainers/runc/libcontainer"
	// The C constructor that joins and makes namespaces before Go's threads exist.
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr/keeper/filters"
	"github.com/coracle-cri/coracle/ctr/wire"
)

// Init turns this process into a container's init when libcontainer has started it as one: it executes this same
// program with the argument "init". Likewise into a stand-in (see sandboxed), and into what compiles a seccomp profile. Else it returns. Call it from an init
// function of the main package.
//
// It also keeps the main goroutine on the main thread for good. While it creates a container, libcontainer moves
// a locked thread into the container's mount namespace and lets the thread die there. Go cannot let the main
// thread die; if that is the one, it stays parked in the namespace, which then never goes away, and /proc/self
// shows that instead of the keeper's.
func Init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		filters.Use()
		libcontainer.Init() // does not return
	}
	if len(os.Args) > 1 && os.Args[1] == filterArg {
		recordFilter() // does not return
	}
	if len(os.Args) > 1 && os.Args[1] == standInArg {
		standIn(os.Args[2:]) // does not return
	}
	runtime.LockOSThread()
}

// initLogLevel makes libcontainer's init pass its warnings on (logrus counts: 3 is a warning).
const initLogLevel = "3"

// validID is no regular expression: each container's init and each exec would compile it, for a third of a millisecond.
func validID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i, c := range []byte(id) {
		alphanumeric := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alphanumeric && (i == 0 || !strings.ContainsRune("_.-", rune(c))) {
			return false
		}
	}
	return true
}

// check refuses what no container can be made of, before anything is touched.
func check(id string, req *wire.Create) error {
	switch {
	case !validID(id):
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
	case req.Runtime != nil && !filepath.IsAbs(req.Runtime.Path):
		return fmt.Errorf("path %q of the runtime is not absolute: %w", req.Runtime.Path, wire.ErrBadRequest)
	case req.LogPath != "" && !filepath.IsAbs(req.LogPath):
		return fmt.Errorf("log path %q is not absolute: %w", req.LogPath, wire.ErrBadRequest)
	case req.LogPath != "" && req.LogDir != "":
		_, err := belowLogDir(req.LogDir, req.LogPath)
		return err
	}
	return nil
}
