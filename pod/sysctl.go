package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A sysctl belongs to a namespace, or to the machine. The kernel lets the owner of a user namespace write the
// former only (net_ctl_permissions, ipc_permissions and set_permissions in its sources).
var ipcSysctls = []string{"kernel.shm", "kernel.msg", "fs.mqueue."}

func validateSysctls(sysctls map[string]string, o *runtimeapi.NamespaceOption) error {
	for _, name := range slices.Sorted(maps.Keys(sysctls)) {
		key := sysctlKey(name)
		if strings.Contains(key, "..") || strings.ContainsAny(name, "\x00\n") {
			return invalid("run pod: %q is no name of a sysctl", name)
		}
		var mode runtimeapi.NamespaceMode
		switch {
		case strings.HasPrefix(key, "net."):
			mode = o.GetNetwork()
		case isIPCSysctl(key):
			mode = o.GetIpc()
		default:
			return invalid("run pod: sysctl %q belongs to the whole machine; a rootless pod can set net.*, kernel.shm*, "+
				"kernel.msg*, kernel.sem and fs.mqueue.*", name)
		}
		if mode == runtimeapi.NamespaceMode_NODE {
			return invalid("run pod: sysctl %q would change the node, whose namespace the pod uses", name)
		}
	}
	return nil
}

func isIPCSysctl(key string) bool {
	if key == "kernel.sem" {
		return true
	}
	return slices.ContainsFunc(ipcSysctls, func(prefix string) bool { return strings.HasPrefix(key, prefix) })
}

// sysctlKey returns the dotted form. In the other, a/b.c/d, the first separator is a slash and dots stand for
// themselves (sysctl.d(5)).
func sysctlKey(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
		return strings.NewReplacer("/", ".", ".", "/").Replace(name)
	}
	return name
}

func sysctlPath(name string) string {
	return filepath.Join("/proc/sys", strings.NewReplacer(".", "/", "/", ".").Replace(sysctlKey(name)))
}

// splitSysctls parts those that name an interface: it exists only once the network is attached.
func splitSysctls(sysctls map[string]string) (early, late map[string]string) {
	early, late = map[string]string{}, map[string]string{}
	for name, value := range sysctls {
		p := strings.Split(sysctlKey(name), ".") // net.ipv4.conf.eth0.rp_filter
		if len(p) > 4 && p[0] == "net" && (p[2] == "conf" || p[2] == "neigh") && p[3] != "all" && p[3] != "default" && p[3] != "lo" {
			late[name] = value
			continue
		}
		early[name] = value
	}
	return early, late
}

// writeSysctls writes into the namespaces of the calling thread: the kernel resolves /proc/sys/net and the IPC
// files by the namespaces of the task that opens them.
func writeSysctls(sysctls map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(sysctls)) {
		f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
		if err != nil {
			return whyNoSysctl(name, err)
		}
		_, err = f.WriteString(sysctls[name])
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return invalid("set sysctl %q to %q: %v", name, sysctls[name], err)
		}
	}
	return nil
}

func whyNoSysctl(name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return invalid("set sysctl %q: the namespaces of a pod have none of this name: either it is the whole machine's, "+
			"or this kernel does not know it", name)
	case errors.Is(err, fs.ErrPermission):
		return invalid("set sysctl %q: the kernel lets only the host's root change it", name)
	case errors.Is(err, unix.EROFS):
		return wrongState("set sysctl %q: /proc/sys is read-only on this node, as it is in a container without privileges", name)
	}
	return fmt.Errorf("set sysctl %q: %w", name, err)
}
