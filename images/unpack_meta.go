package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	blockSize  = 4096
	holeSize   = 4096 // a run of zeros of this size in a sparse entry stays a hole
	overflowID = 65534
	paxXattr   = "SCHILY.xattr."
	maxNotes   = 64 // kinds of notes a layer
)

// noteList gathers what was left out: each kind once, with a count and the first path.
type noteList struct{ list []note }

func (n *noteList) add(what, path string) {
	for i := range n.list {
		if n.list[i].What == what {
			n.list[i].Count++
			return
		}
	}
	if len(n.list) < maxNotes {
		n.list = append(n.list, note{What: what, Count: 1, Sample: path})
	}
}

// owner maps an entry's owner into this user namespace: chown(2) to an id that is not mapped is EINVAL.
func (u *unpacker) owner(at place, h *tar.Header) (uid, gid int, err error) {
	uid, gid = u.ids.uid.clamp(h.Uid), u.ids.gid.clamp(h.Gid)
	if uid == h.Uid && gid == h.Gid {
		return uid, gid, nil
	}
	if u.refuseIDs {
		return 0, 0, fmt.Errorf("%w: owner %d:%d is outside the ids of this user (%s): give the user more subordinate ids in /etc/subuid and /etc/subgid",
			ErrRefused, h.Uid, h.Gid, u.ids)
	}
	u.notes.add(fmt.Sprintf("owner outside the mapped ids (%s): files belong to %d:%d instead", u.ids, u.ids.uid.clamp(-1), u.ids.gid.clamp(-1)),
		fmt.Sprintf("%s (%d:%d)", at.name, h.Uid, h.Gid))
	return uid, gid, nil
}

// xattrs sets the extended attributes of an entry, on fd, or by path where there is no descriptor (links,
// fifos). The overlay's own attributes would let an image change what its lower layers show, and never come
// from an archive.
func (u *unpacker) xattrs(fd int, path string, at place, h *tar.Header) error {
	for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok {
			continue
		}
		if strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.fuseoverlayfs.") {
			u.notes.add("attribute "+printable(name)+" left out: it belongs to the overlay", at.name)
			continue
		}
		var err error
		if path == "" {
			err = unix.Fsetxattr(fd, name, []byte(h.PAXRecords[key]), 0)
		} else {
			err = unix.Lsetxattr(path, name, []byte(h.PAXRecords[key]), 0)
		}
		switch {
		case err == nil:
		case errors.Is(err, unix.EOPNOTSUPP), mayBeRefused(name) && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL)):
			u.notes.add(fmt.Sprintf("attribute %s left out: %s", printable(name), err), at.name)
		case errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG):
			return fmt.Errorf("%w: attribute %s of %d bytes: the kernel takes 255 bytes of name and 65536 of value", ErrRefused, printable(name), len(h.PAXRecords[key]))
		default:
			return fmt.Errorf("set attribute %s of %d bytes: %w", printable(name), len(h.PAXRecords[key]), err)
		}
	}
	return nil
}

// printable is a name from an archive as a message may show it.
func printable(name string) string {
	if quoted := fmt.Sprintf("%.100q", name); quoted != `"`+name+`"` {
		return quoted
	}
	return name
}

// mayBeRefused tells the attributes that the kernel keeps from a user namespace: trusted.*, security.* but file
// capabilities, and ACLs that name ids outside the map.
func mayBeRefused(name string) bool {
	return name != "security.capability" && !strings.HasPrefix(name, "user.")
}

// finishNode sets owner, mode, attributes and time of what has no descriptor.
func (u *unpacker) finishNode(at place, h *tar.Header) error {
	uid, gid, err := u.owner(at, h)
	if err != nil {
		return err
	}
	if uid != 0 || gid != 0 {
		if err := unix.Fchownat(at.fd, at.base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("change owner: %w", err)
		}
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(at.fd, at.base, uint32(h.Mode&0o7777), 0); err != nil {
			return fmt.Errorf("change mode: %w", err)
		}
	}
	if err := u.xattrs(-1, fmt.Sprintf("/proc/self/fd/%d/%s", at.fd, at.base), at, h); err != nil {
		return err
	}
	return setTime(at, h)
}

func setTime(at place, h *tar.Header) error {
	ts := mtime(h)
	if err := unix.UtimesNanoAt(at.fd, at.base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// mtime is the entry's time; none is 1970, and what the kernel cannot hold is the nearest that it can.
func mtime(h *tar.Header) unix.Timespec {
	t := h.ModTime
	if t.IsZero() {
		t = time.Unix(0, 0)
	}
	sec := min(max(t.Unix(), -1<<31), 1<<33) // ext4's range is smaller still, and is clamped by the kernel
	return unix.Timespec{Sec: sec, Nsec: int64(t.Nanosecond())}
}

func applyDirMeta(fd int, m dirMeta) error {
	if err := unix.Fchown(fd, m.UID, m.GID); err != nil {
		return fmt.Errorf("change owner: %w", err)
	}
	if err := unix.Fchmod(fd, m.Mode); err != nil {
		return fmt.Errorf("change mode: %w", err)
	}
	ts := unix.NsecToTimespec(m.MTime)
	if err := unix.UtimesNanoAt(fd, ".", []unix.Timespec{ts, ts}, 0); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

func sameFile(fd int, base string, at place) (bool, error) {
	var a, b unix.Stat_t
	if err := unix.Fstatat(fd, base, &a, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("hard link: %w", err)
	}
	if err := unix.Fstatat(at.fd, at.base, &b, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("hard link: %w", err)
	}
	return a.Dev == b.Dev && a.Ino == b.Ino, nil
}

func writeAll(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write file: %w", err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

var zeros [holeSize]byte

func allZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

// idMap is one side of this user namespace's id map: ranges [first, first+count).
type idMap []struct{ first, count int }

type idMaps struct{ uid, gid idMap }

func (m idMap) has(id int) bool {
	return slices.ContainsFunc(m, func(r struct{ first, count int }) bool { return id >= r.first && id-r.first < r.count })
}

// clamp returns id where it is mapped, else the kernel's overflow id, else (single-id maps) 0.
func (m idMap) clamp(id int) int {
	switch {
	case m.has(id):
		return id
	case m.has(overflowID):
		return overflowID
	default:
		return 0
	}
}

func (m idMap) total() (n int) {
	for _, r := range m {
		n += r.count
	}
	return n
}

func (m idMaps) String() string {
	return strconv.Itoa(m.uid.total()) + " uids, " + strconv.Itoa(m.gid.total()) + " gids"
}

func readIDMaps() (m idMaps, err error) {
	if m.uid, err = readIDMap("/proc/self/uid_map"); err != nil {
		return m, err
	}
	m.gid, err = readIDMap("/proc/self/gid_map")
	return m, err
}

func readIDMap(file string) (idMap, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read id map: %w", err)
	}
	var m idMap
	for line := range strings.Lines(string(raw)) {
		var r struct{ first, count int }
		var outside int
		if _, err := fmt.Sscan(line, &r.first, &outside, &r.count); err != nil {
			return nil, fmt.Errorf("read id map %s: %w", file, err)
		}
		m = append(m, r)
	}
	return m, nil
}
