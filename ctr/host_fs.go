package ctr

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	cdispecs "tags.cncf.io/container-device-interface/specs-go"
)

// NodeFS answers what BuildSpec asks about the node's files. No method blocks on anything but the filesystem;
// all may run at once.
type NodeFS interface {
	// Lookup follows symbolic links and returns what is found there. fs.ErrNotExist where there is nothing.
	Lookup(path string) (Source, error)
	// Propagation returns the propagation type of the mount that holds path.
	Propagation(path string) (Propagation, error)
	// Devices returns the character and block devices under dir, with their directories, that this user can open.
	Devices(dir string) ([]string, error)
	// ReadFile returns the content of a regular file.
	ReadFile(path string) ([]byte, error)
	// CDIEdits returns what the CDI specifications in dirs ask for devices, of which there is at least one. Of two
	// directories that describe a device the later counts. ErrInvalid for a device that none does.
	CDIEdits(dirs, devices []string) (*cdispecs.ContainerEdits, error)
}

// Source is a file or directory of the node that a container may mount.
type Source struct {
	Path  string      // absolute, without symbolic links
	Mode  fs.FileMode // its type and permissions
	Flags []string    // the flags of the mount that holds it, as mount options; see MountFlags
}

// Propagation is how mounts made under a directory travel (mount_namespaces(7)).
type Propagation struct{ Shared, Slave bool }

// statFlags are the flags that statfs(2) reports and that a remount would clear where it does not name them. In a
// user namespace those that came with an inherited mount are locked: the kernel answers EPERM to a remount
// without them (mount_namespaces(7), "Restrictions on mount namespaces"). Those of a mount made here are not
// locked, and would be lost in silence: nosuid or noexec must outlive "ro" either way.
var statFlags = []struct {
	flag   int64
	option string
}{
	{unix.ST_RDONLY, "ro"},
	{unix.ST_NOSUID, "nosuid"},
	{unix.ST_NODEV, "nodev"},
	{unix.ST_NOEXEC, "noexec"},
	{unix.ST_NODIRATIME, "nodiratime"},
	{stNoSymfollow, "nosymfollow"},
	{unix.ST_NOATIME, "noatime"},
	{unix.ST_RELATIME, "relatime"},
}

// atimeOptions exclude each other. strictatime has no flag of its own: it is the absence of the others.
var atimeOptions = []string{"noatime", "relatime", "strictatime"}

// stNoSymfollow is ST_NOSYMFOLLOW of linux/statfs.h, which golang.org/x/sys does not have.
const stNoSymfollow = 0x2000

// MountFlags returns the flags of the mount that holds path, as mount options. A bind mount of path whose options
// change must repeat them.
func MountFlags(path string) ([]string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	var out []string
	for _, f := range statFlags {
		if int64(st.Flags)&f.flag != 0 {
			out = append(out, f.option)
		}
	}
	if st.Flags&(unix.ST_NOATIME|unix.ST_RELATIME) == 0 {
		out = append(out, "strictatime")
	}
	return out, nil
}

type nodeFS struct{}

func (nodeFS) Lookup(path string) (Source, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Source{}, err
	}
	info, err := os.Stat(real)
	if err != nil {
		return Source{}, err
	}
	flags, err := MountFlags(real)
	if err != nil {
		return Source{}, err
	}
	return Source{Path: real, Mode: info.Mode(), Flags: flags}, nil
}

// Propagation finds the mount by its id, not by the longest prefix: mounts may be stacked on one directory.
func (nodeFS) Propagation(path string) (Propagation, error) {
	var stx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &stx); err != nil {
		return Propagation{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return Propagation{}, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	id := strconv.FormatUint(stx.Mnt_id, 10)
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if p, ok := parseMountinfo(lines.Text(), id); ok {
			return p, nil
		}
	}
	if err := lines.Err(); err != nil {
		return Propagation{}, fmt.Errorf("read mounts: %w", err)
	}
	return Propagation{}, fmt.Errorf("find mount %s of %s: %w", id, path, fs.ErrNotExist)
}

// parseMountinfo reads the optional fields, between the sixth and "-", of the line of mount id (proc(5)).
func parseMountinfo(line, id string) (Propagation, bool) {
	fields := strings.Fields(line)
	if len(fields) < 7 || fields[0] != id {
		return Propagation{}, false
	}
	var p Propagation
	for _, f := range fields[6:] {
		if f == "-" {
			break
		}
		p.Shared = p.Shared || strings.HasPrefix(f, "shared:")
		p.Slave = p.Slave || strings.HasPrefix(f, "master:")
	}
	return p, true
}

// ownDevices are what each container has of its own in /dev: never taken from the node.
var ownDevices = []string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console", "/dev/ptmx", "/dev/tty"}

func (nodeFS) Devices(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if slices.Contains(ownDevices, path) || err != nil && path != dir {
			if d != nil && d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeDevice == 0 {
			return nil
		}
		if unix.Access(path, unix.R_OK) == nil || unix.Access(path, unix.W_OK) == nil {
			out = append(out, path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return out, nil
}

func (nodeFS) ReadFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &os.PathError{Op: "read", Path: path, Err: fs.ErrInvalid}
	}
	return os.ReadFile(path)
}
