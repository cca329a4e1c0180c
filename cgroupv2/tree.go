package cgroupv2

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	podsParent = "/pods"
	supervisor = "/supervisor"
)

// Tree is the node's cgroup tree as seen inside. It holds no state but what Open learnt and may be used by many
// goroutines at once. Paths are relative to the mount and begin with "/", as OCI's cgroupsPath wants them.
type Tree struct {
	mount       group
	usable      bool
	reason      string // why it is not usable, or why a controller is missing
	controllers []string
	files       map[string]bool // what a pod's cgroup has, so that nobody looks for the rest; nil: not known
}

// Open looks at the tree mounted on mount and enables every controller that it has for the pods. Without a
// writable cgroup v2 tree there it returns a Tree that is not Usable, and no error: a node runs without, too.
func Open(mount string) (*Tree, error) {
	t := &Tree{mount: group(filepath.Clean(mount))}
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		t.reason = fmt.Sprintf("no cgroup2 on %s: %v", mount, err)
		return t, nil
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		t.reason = fmt.Sprintf("no cgroup2 on %s", mount)
		return t, nil
	}
	for _, file := range []group{t.mount, t.mount.join(procsFile), t.mount.join(subtreeFile)} {
		if err := mayWrite(string(file)); err != nil {
			t.reason = fmt.Sprintf("%s is not writable: %v", file, err)
			return t, nil
		}
	}
	if err := t.claim(); err != nil {
		return nil, fmt.Errorf("open cgroup tree: %w", err)
	}
	return t, nil
}

// claim enables the controllers in the root and in the pods' parent: what is in force there is ours. What the
// kernel refuses is not an error: it is missing in Controllers and told by Reason, which Status shows.
func (t *Tree) claim() error {
	pods := t.mount.join(podsParent)
	if _, err := pods.mkdir(); err != nil {
		return err
	}
	for _, g := range []group{t.mount, pods} {
		available, err := g.available()
		if err != nil {
			return err
		}
		if _, err := g.enable(available); err != nil {
			t.reason = err.Error()
		}
		if t.controllers, err = g.inForce(); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(string(pods))
	if err != nil {
		return fmt.Errorf("list cgroup files: %w", err)
	}
	t.files = make(map[string]bool, len(entries))
	for _, e := range entries {
		t.files[e.Name()] = true
	}
	t.usable = true
	return nil
}

// Usable tells whether cgroups can be made.
func (t *Tree) Usable() bool { return t.usable }

// Reason says, in words for Status, why the tree is not usable or why a controller of it could not be enabled.
func (t *Tree) Reason() string { return t.reason }

// Controllers lists what is enabled for pods and their containers.
func (t *Tree) Controllers() []string { return slices.Clone(t.controllers) }

// MakePod makes the cgroup pod<podID> below parent, the kubelet's cgroup_parent, or below /pods where that is
// empty, and enables the controllers in every cgroup on the way and in it, for the containers to come. It returns
// its path, the parent of the containers' cgroupsPath. Idempotent; it removes what it made when a step fails.
// Parents stay until the node goes: they are the kubelet's.
func (t *Tree) MakePod(parent, podID string) (_ string, err error) {
	if !t.Usable() {
		return "", fmt.Errorf("make pod cgroup: %w: %s", ErrNotUsable, t.reason)
	}
	if err := checkName(podID); err != nil {
		return "", fmt.Errorf("make pod cgroup: %w", err)
	}
	if parent == "" || parent == "/" {
		parent = podsParent
	}
	full, err := cleanPath(path.Join("/", parent, "pod"+podID), parent)
	if err != nil {
		return "", fmt.Errorf("make pod cgroup: %w", err)
	}
	var back undo
	defer func() {
		if errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.ENOTDIR) {
			err = fmt.Errorf("%w: %w", ErrInvalidPath, err) // a name that no cgroup can have, or below a file of the kernel's
		}
		if err != nil {
			err = fmt.Errorf("make pod cgroup %.300q: %w", full, back.run(err))
		}
	}()
	at := t.mount
	for name := range strings.SplitSeq(full[1:], "/") {
		at = at.join(name)
		fresh, err := at.mkdir()
		if err != nil {
			return "", err
		}
		if fresh {
			back.push(at.rmdir)
		}
		if _, err := at.enable(t.controllers); err != nil {
			return "", err
		}
	}
	return full, nil
}

// RemovePod kills what lives in the pod's cgroup, waits until it is gone and removes the cgroup with all below.
// It returns within some ten seconds: ErrBusy where a process hangs in the kernel. Idempotent.
func (t *Tree) RemovePod(pod string) error {
	if !t.Usable() {
		return nil // there, no pod has a cgroup
	}
	// Only what MakePod makes is removed: never the root, the node's own processes or the kubelet's cgroups.
	full, err := cleanPath(pod, pod)
	if err == nil && (path.Dir(full) == "/" || !strings.HasPrefix(path.Base(full), "pod")) {
		err = fmt.Errorf("%q is no pod: %w", pod, ErrInvalidPath)
	}
	if err == nil {
		err = t.mount.join(full).remove(time.Now().Add(removeDeadline))
	}
	if err != nil {
		return fmt.Errorf("remove pod cgroup: %w", err)
	}
	return nil
}

// Kill sends SIGKILL to every process of the cgroup and of those below it, and does not wait. A cgroup that is
// gone is no error.
func (t *Tree) Kill(pod string) error {
	if !t.Usable() {
		return fmt.Errorf("kill cgroup: %w: %s", ErrNotUsable, t.reason)
	}
	full, err := cleanPath(pod, pod)
	if err == nil {
		err = t.mount.join(full).kill()
	}
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil
}

// cleanPath checks a path inside the tree: below the root, not above it by "..", and not the node's own leaf.
func cleanPath(p, given string) (string, error) {
	full := path.Clean("/" + p)
	if slices.Contains(strings.Split(given, "/"), "..") || strings.ContainsAny(given, "\n\x00") ||
		full == "/" || within(supervisor, group(full)) {
		return "", fmt.Errorf("%q: %w", given, ErrInvalidPath)
	}
	return full, nil
}
