package rootless

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
)

// DefaultName is the node that is meant when no name is given.
const DefaultName = "default"

// Node names the directories of one node. RuntimeDir lives as long as the node does; DataDir (images, specs)
// outlives it.
type Node struct {
	Name       string
	RuntimeDir string
	DataDir    string
}

var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// sunPathMax is the longest path of a unix socket, in bytes, without the final NUL (unix(7)).
const sunPathMax = 107

// NewNode computes the directories of the node called name from the XDG base directories, and checks that they
// can be used. An error is a *Problem where the host is to be mended.
func NewNode(name string, getenv func(string) string) (Node, error) {
	if !nodeName.MatchString(name) {
		return Node{}, fmt.Errorf("node name %q: use 1 to 32 lower-case letters, digits and inner dashes", name)
	}
	folder := "coracle"
	if name != DefaultName {
		folder += "-" + name
	}
	runtimeHome, err := runtimeHome(getenv)
	if err != nil {
		return Node{}, err
	}
	dataHome, err := dataHome(getenv)
	if err != nil {
		return Node{}, err
	}
	node := Node{Name: name, RuntimeDir: filepath.Join(runtimeHome, folder), DataDir: filepath.Join(dataHome, folder)}
	if longest := filepath.Join(node.RootlesskitDir(), ".bp-ready.pipe"); len(longest) > sunPathMax {
		return Node{}, &Problem{
			Check: "runtime directory",
			Cause: fmt.Sprintf("%s is too long for unix sockets below it (%d bytes, %d at most)", node.RuntimeDir, len(longest), sunPathMax),
			Fix:   fmt.Sprintf("mkdir -m 0700 /tmp/xdg-%d && export XDG_RUNTIME_DIR=/tmp/xdg-%d", os.Getuid(), os.Getuid()),
		}
	}
	return node, nil
}

// Socket is the CRI endpoint of the node.
func (n Node) Socket() string { return filepath.Join(n.RuntimeDir, "coracle.sock") }

// Endpoint is Socket as a URL, as CONTAINER_RUNTIME_ENDPOINT wants it: clients decode its path, so that a blank in a
// directory's name comes through, also through the shell that the line to export is for.
func (n Node) Endpoint() string { return (&url.URL{Scheme: "unix", Path: n.Socket()}).String() }

// CgroupName names the node's cgroup in a delegated subtree. Nodes of the same name with other runtime directories (two
// CI jobs of one user) share that subtree, and none may take the other's cgroup for one that a crash left.
func (n Node) CgroupName() string {
	sum := sha256.Sum256([]byte(n.RuntimeDir))
	return n.Name + "-" + hex.EncodeToString(sum[:4])
}

// KeeperSocket is where the daemon reaches the keeper.
func (n Node) KeeperSocket() string { return filepath.Join(n.RuntimeDir, "keeper.sock") }

// RootlesskitDir is RootlessKit's state directory.
func (n Node) RootlesskitDir() string { return filepath.Join(n.RuntimeDir, "rk") }

// PortsSocket is where the parent publishes ports of the host.
func (n Node) PortsSocket() string { return filepath.Join(n.RuntimeDir, "ports.sock") }

// APISocket is RootlessKit's REST API, which says what the node is made of.
func (n Node) APISocket() string { return filepath.Join(n.RootlesskitDir(), "api.sock") }

// parentLock is the lock that RootlessKit's parent holds for life.
func (n Node) parentLock() string { return filepath.Join(n.RootlesskitDir(), "lock") }

// NetNS is the node's network namespace; the bind mount is seen inside the node's mount namespace only.
func (n Node) NetNS() string { return filepath.Join(n.RootlesskitDir(), "netns") }

// LogFile is where a detached node logs.
func (n Node) LogFile() string { return filepath.Join(n.DataDir, "node.log") }

func (n Node) recordFile() string { return filepath.Join(n.RuntimeDir, "node.json") }
func (n Node) lockFile() string   { return filepath.Join(n.DataDir, "lock") }

// Known tells whether the node has a directory, that is whether it was ever up.
func (n Node) Known() bool {
	for _, dir := range []string{n.RuntimeDir, n.DataDir} {
		if _, err := os.Lstat(dir); err == nil {
			return true
		}
	}
	return false
}

// MakeDirs makes both directories, 0700. One that is there must be this user's, and is closed to others: in a place
// that all may write, such as /tmp, somebody else could have made it first.
func (n Node) MakeDirs() error { return makeDirs(n.RuntimeDir, n.DataDir) }

// MakeDataDir is MakeDirs for who only looks whether there is a runtime directory: there may be no room to make it.
func (n Node) MakeDataDir() error {
	if _, err := os.Lstat(n.RuntimeDir); err == nil {
		return n.MakeDirs()
	}
	return makeDirs(n.DataDir)
}

func makeDirs(dirs ...string) error {
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		// The directory, and the symbolic link that may lead to it.
		for _, stat := range []func(string) (os.FileInfo, error){os.Lstat, os.Stat} {
			info, err := stat(dir)
			if err != nil {
				return fmt.Errorf("make directory: %w", err)
			}
			if uid := owner(info); uid != os.Geteuid() {
				return &Problem{Check: "directories", Cause: fmt.Sprintf("%s belongs to uid %d and not to you", dir, uid),
					Fix: runtimeHomeFix()}
			}
			if info.IsDir() && info.Mode().Perm()&0o077 != 0 {
				if err := os.Chmod(dir, 0o700); err != nil {
					return fmt.Errorf("make directory private: %w", err)
				}
			}
		}
	}
	return nil
}

// owner is the user that a file on disk belongs to.
func owner(info os.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

func runtimeHome(getenv func(string) string) (string, error) {
	dir := getenv("XDG_RUNTIME_DIR")
	problem := &Problem{Check: "runtime directory", Fix: runtimeHomeFix()}
	switch {
	case dir == "":
		problem.Cause = "XDG_RUNTIME_DIR is not set, so there is no place for the node's sockets"
	case !filepath.IsAbs(dir):
		problem.Cause = fmt.Sprintf("XDG_RUNTIME_DIR is %q, which is not an absolute path", dir)
	default:
		if err := checkWritable(dir); err != nil {
			problem.Cause = fmt.Sprintf("XDG_RUNTIME_DIR is %s, which cannot be used: %v", dir, err)
			break
		}
		if who := openTo(dir); who != "" {
			problem.Cause = fmt.Sprintf("XDG_RUNTIME_DIR is %s, in which %s may put something else in place of the node's sockets", dir, who)
			break
		}
		return dir, nil
	}
	return "", problem
}

// openTo names who else may rename what is in the directory, "" where nobody may. The XDG Base Directory Specification wants it
// to be the user's own, 0700; a directory of the machine's owner with the sticky bit, as /tmp is, serves too.
func openTo(dir string) string {
	info, err := os.Stat(dir)
	if err != nil {
		return ""
	}
	root, err := os.Stat("/") // who owns it may do so anyway, and has another number in a user namespace
	if uid := owner(info); uid != os.Geteuid() && uid != 0 && (err != nil || uid != owner(root)) {
		return fmt.Sprintf("uid %d, whose it is,", uid)
	}
	if info.Mode().Perm()&0o002 != 0 && info.Mode()&os.ModeSticky == 0 {
		return "everybody"
	}
	return ""
}

// runtimeHomeFix is the login session's own directory where there is one, else one under /tmp.
func runtimeHomeFix() string {
	session := fmt.Sprintf("/run/user/%d", os.Getuid())
	if checkWritable(session) == nil {
		return "export XDG_RUNTIME_DIR=" + session
	}
	return fmt.Sprintf("mkdir -p -m 0700 /tmp/xdg-%d && export XDG_RUNTIME_DIR=/tmp/xdg-%d", os.Getuid(), os.Getuid())
}

func dataHome(getenv func(string) string) (string, error) {
	dir := getenv("XDG_DATA_HOME")
	if dir == "" {
		if getenv("HOME") == "" {
			return "", &Problem{Check: "data directory", Cause: "neither HOME nor XDG_DATA_HOME is set, so there is no place for images",
				Fix: "export XDG_DATA_HOME=/var/tmp/data-$(id -u) && mkdir -p -m 0700 $XDG_DATA_HOME"}
		}
		dir = filepath.Join(getenv("HOME"), ".local", "share")
	}
	if err := os.MkdirAll(dir, 0o700); err == nil {
		if checkWritable(dir) == nil {
			return dir, nil
		}
	}
	return "", &Problem{Check: "data directory", Cause: fmt.Sprintf("%s, where images are kept, cannot be written", dir),
		Fix: "export XDG_DATA_HOME=/var/tmp/data-$(id -u) && mkdir -p -m 0700 $XDG_DATA_HOME"}
}
