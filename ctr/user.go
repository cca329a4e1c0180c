package ctr

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Users reads a file of a container's root filesystem, given by its absolute path there. fs.ErrNotExist where the
// file is missing.
type Users func(path string) ([]byte, error)

// maxUserFile bounds what an image can make the daemon read as its passwd or group.
const maxUserFile = 4 << 20

// RootfsUsers returns Users of the root filesystem at dir. The kernel resolves each path inside dir, whatever
// symbolic links the image has (openat2(2), RESOLVE_IN_ROOT).
func RootfsUsers(dir string) Users {
	return func(path string) ([]byte, error) {
		root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: dir, Err: err}
		}
		defer unix.Close(root)
		// O_NONBLOCK: a FIFO in the place of the file must not hold the daemon.
		fd, err := unix.Openat2(root, path, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() || info.Size() > maxUserFile {
			return nil, fmt.Errorf("read %s of the image: not a regular file of at most %d bytes", path, maxUserFile)
		}
		return io.ReadAll(io.LimitReader(f, maxUserFile))
	}
}

// user sets the uid, gid and supplementary groups.
func (b *builder) user() error {
	name, err := b.userSpec()
	if err != nil {
		return err
	}
	passwd, err := b.readUsers("/etc/passwd")
	if err != nil {
		return err
	}
	group, err := b.readUsers("/etc/group")
	if err != nil {
		return err
	}
	if b.security.GetRunAsUsername() != "" {
		// "the user MUST exist in the container image" (CRI): a number is a name here.
		if err := userExists(b.security.GetRunAsUsername(), passwd); err != nil {
			return err
		}
	}
	who, err := user.GetExecUser(name, nil, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return invalid("user %q of the image: %w", name, err)
	}
	if b.security.GetRunAsGroup() != nil {
		who.Gid = int(b.security.GetRunAsGroup().GetValue())
	}
	groups := slices.Clone(b.security.GetSupplementalGroups())
	switch policy := b.security.GetSupplementalGroupsPolicy(); policy {
	case runtimeapi.SupplementalGroupsPolicy_Merge:
		// Membership is the user's, so the group of "user:group" does not count.
		onlyUser, _, _ := strings.Cut(name, ":")
		member, err := user.GetExecUser(onlyUser, nil, bytes.NewReader(passwd), bytes.NewReader(group))
		if err != nil {
			return invalid("user %q of the image: %w", name, err)
		}
		for _, g := range member.Sgids {
			groups = append(groups, int64(g))
		}
	case runtimeapi.SupplementalGroupsPolicy_Strict:
	default:
		return invalid("supplemental_groups_policy %d is unknown", policy)
	}
	return b.setUser(int64(who.Uid), int64(who.Gid), groups)
}

// userSpec picks who runs the container: the CRI's user, else the image's USER.
func (b *builder) userSpec() (string, error) {
	uid, name, gid := b.security.GetRunAsUser(), b.security.GetRunAsUsername(), b.security.GetRunAsGroup()
	switch {
	case uid != nil && name != "":
		return "", invalid("run_as_user %d and run_as_username %q: only one of them can be specified", uid.GetValue(), name)
	case uid == nil && name == "" && gid != nil:
		return "", invalid("run_as_group %d without run_as_user or run_as_username", gid.GetValue())
	case gid != nil && !validID(gid.GetValue()):
		return "", invalid("run_as_group %d is not a group id", gid.GetValue())
	case uid != nil && !validID(uid.GetValue()):
		return "", invalid("run_as_user %d is not a user id", uid.GetValue())
	case uid != nil:
		return strconv.FormatInt(uid.GetValue(), 10), nil
	case strings.Contains(name, ":"):
		return "", invalid("run_as_username %q is not a user's name", name)
	case name != "":
		return name, nil
	}
	return b.req.Image.User, nil
}

// validID: (uid_t)-1 means "no change" to the kernel.
func validID(id int64) bool { return id >= 0 && id < 1<<32-1 }

// readUsers returns nothing for a file that the image does not have: numeric ids need none.
func (b *builder) readUsers(path string) ([]byte, error) {
	if b.req.Users == nil {
		return nil, nil
	}
	raw, err := b.req.Users(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look up user: %w", err)
	}
	return raw, nil
}

func userExists(name string, passwd []byte) error {
	found, err := user.ParsePasswdFilter(bytes.NewReader(passwd), func(u user.User) bool { return u.Name == name })
	if err != nil {
		return fmt.Errorf("read /etc/passwd of the image: %w", err)
	}
	if len(found) == 0 {
		return invalid("run_as_username %q is not in /etc/passwd of the image", name)
	}
	return nil
}

// setUser checks that each id exists in the node's user namespace: set*id(2) answers EINVAL to others, and that
// only when the container starts.
func (b *builder) setUser(uid, gid int64, groups []int64) error {
	ids := b.req.Host.IDs
	if !ids.HasUID(uid) {
		return unmapped("uid", uid, ids.UIDs)
	}
	if !ids.HasGID(gid) {
		return unmapped("gid", gid, ids.GIDs)
	}
	b.spec.Process.User = specs.User{UID: uint32(uid), GID: uint32(gid)}
	return b.addGroups(groups)
}

// addGroups adds supplementary groups to the user that is set.
func (b *builder) addGroups(groups []int64) error {
	ids, u := b.req.Host.IDs, &b.spec.Process.User
	extra := slices.DeleteFunc(slices.Clone(groups), func(g int64) bool { return g == int64(u.GID) })
	if ids.SetgroupsDenied {
		// Without a gid map by newgidmap the kernel refuses setgroups(2) for good (user_namespaces(7)).
		if len(extra) > 0 {
			return b.lack("supplementary groups %v are not applied: this node has a single group id", extra)
		}
		return nil
	}
	all := append(slices.Clone(u.AdditionalGids), u.GID) // the primary group stands among them, as initgroups(3) has it
	for _, g := range extra {
		if !ids.HasGID(g) {
			return unmapped("supplementary gid", g, ids.GIDs)
		}
		all = append(all, uint32(g))
	}
	slices.Sort(all)
	u.AdditionalGids = slices.Compact(all)
	return nil
}

func unmapped(what string, id int64, ranges []IDRange) error {
	return unsupported("%s %d does not exist in this node's user namespace, which has %s; "+
		"subordinate ids come from /etc/subuid and /etc/subgid", what, id, rangesString(ranges))
}
