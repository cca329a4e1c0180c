package ctr

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// Host is what BuildSpec knows of the node: facts, gathered once by GatherHost, or written down by a test.
type Host struct {
	Controllers     map[string]bool  // cgroup v2 controllers in force for containers
	CgroupUsable    bool             // containers can have cgroups of their own, be it without controllers
	CgroupV2Mounted bool             // a cgroup2 filesystem is at /sys/fs/cgroup, where libcontainer looks for it
	OOMScoreAdjMin  int              // the runtime's own oom_score_adj, under which it cannot set another's
	Rlimits         map[string]Limit // the runtime's own limits by name (RLIMIT_NOFILE): the hard ones bind
	Seccomp         bool             // the kernel takes seccomp filters
	AppArmor        bool             // AppArmor is on
	SysReadonly     bool             // the node's /sys is mounted read-only
	IDs             IDMap            // user and group ids that exist in the node's user namespace
	FS              NodeFS           // the node's files
	CDISpecDirs     []string         // directories of CDI specifications, the later outranking the earlier
	Strict          bool             // policy: refuse what cannot be enforced
}

// Limit is a resource limit; unix.RLIM_INFINITY is none.
type Limit struct{ Soft, Hard uint64 }

// IDRange is a run of Count ids from First.
type IDRange struct{ First, Count uint64 }

// IDMap tells which ids the node's user namespace has.
type IDMap struct {
	UIDs, GIDs      []IDRange
	SetgroupsDenied bool // setgroups(2) is refused: no newgidmap, a single gid (user_namespaces(7))
}

// HasUID tells whether uid exists in the node's user namespace.
func (m IDMap) HasUID(uid int64) bool { return inRanges(m.UIDs, uid) }

// HasGID tells whether gid exists in the node's user namespace.
func (m IDMap) HasGID(gid int64) bool { return inRanges(m.GIDs, gid) }

func inRanges(ranges []IDRange, id int64) bool {
	return id >= 0 && slices.ContainsFunc(ranges, func(r IDRange) bool {
		return uint64(id) >= r.First && uint64(id)-r.First < r.Count
	})
}

// rangesString writes ranges, joining those that touch: the "0" and "1-65536" of rootless tools are one run.
func rangesString(ranges []IDRange) string {
	var runs []IDRange
	for _, r := range ranges {
		if n := len(runs); n > 0 && runs[n-1].First+runs[n-1].Count == r.First {
			runs[n-1].Count += r.Count
			continue
		}
		runs = append(runs, r)
	}
	parts := make([]string, 0, len(runs))
	for _, r := range runs {
		if r.Count == 1 {
			parts = append(parts, strconv.FormatUint(r.First, 10))
			continue
		}
		parts = append(parts, fmt.Sprintf("%d-%d", r.First, r.First+r.Count-1))
	}
	return strings.Join(parts, ", ")
}

// HostOptions is what GatherHost is told, because others found it or decided it.
type HostOptions struct {
	CgroupUsable bool     // see Host
	Controllers  []string // see Host
	Strict       bool     // see Host
	CDISpecDirs  []string // see Host
}

// GatherHost reads the facts of the node from inside its user namespace.
func GatherHost(o HostOptions) (Host, error) {
	h := Host{
		Controllers:  map[string]bool{},
		CgroupUsable: o.CgroupUsable,
		Strict:       o.Strict,
		CDISpecDirs:  o.CDISpecDirs,
		FS:           nodeFS{},
		Seccomp:      seccompAvailable(),
		AppArmor:     appArmorEnabled(),
	}
	for _, c := range o.Controllers {
		h.Controllers[c] = true
	}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil {
		h.CgroupV2Mounted = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	if unix.Statfs("/sys", &st) == nil {
		h.SysReadonly = st.Flags&unix.ST_RDONLY != 0
	}
	raw, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return Host{}, fmt.Errorf("read own oom_score_adj: %w", err)
	}
	if h.OOMScoreAdjMin, err = strconv.Atoi(strings.TrimSpace(string(raw))); err != nil {
		return Host{}, fmt.Errorf("read own oom_score_adj: %w", err)
	}
	if h.Rlimits, err = ownRlimits(); err != nil {
		return Host{}, err
	}
	if h.IDs, err = ownIDMap(); err != nil {
		return Host{}, err
	}
	return h, nil
}

// seccompAvailable asks as seccomp(2) says: a filter at NULL is EFAULT where filters are known, EINVAL elsewhere.
func seccompAvailable() bool {
	return errors.Is(unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0), unix.EFAULT)
}

// appArmorEnabled asks what libcontainer asks before it applies a profile: the module's parameter and securityfs.
func appArmorEnabled() bool {
	if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil {
		return false
	}
	raw, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && bytes.HasPrefix(raw, []byte("Y"))
}

// ownRlimits reads the limits of this process. The soft limit of open files is that which the Go runtime raised;
// children start with the one before, and only the hard limits matter here.
func ownRlimits() (map[string]Limit, error) {
	out := make(map[string]Limit, len(wire.Rlimits))
	for name, number := range wire.Rlimits {
		var r unix.Rlimit
		if err := unix.Getrlimit(number, &r); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		out[name] = Limit{Soft: r.Cur, Hard: r.Max}
	}
	return out, nil
}

func ownIDMap() (IDMap, error) {
	var m IDMap
	for file, ranges := range map[string]*[]IDRange{"/proc/self/uid_map": &m.UIDs, "/proc/self/gid_map": &m.GIDs} {
		raw, err := os.ReadFile(file)
		if err != nil {
			return IDMap{}, fmt.Errorf("read id map: %w", err)
		}
		if *ranges, err = parseIDMap(string(raw)); err != nil {
			return IDMap{}, fmt.Errorf("read id map %s: %w", file, err)
		}
	}
	raw, err := os.ReadFile("/proc/self/setgroups")
	m.SetgroupsDenied = err == nil && strings.TrimSpace(string(raw)) == "deny"
	return m, nil
}

func parseIDMap(raw string) ([]IDRange, error) {
	var out []IDRange
	for line := range strings.Lines(raw) {
		var r IDRange
		var outside uint64
		if _, err := fmt.Sscan(line, &r.First, &outside, &r.Count); err != nil {
			return nil, fmt.Errorf("parse %q: %w", strings.TrimSpace(line), err)
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b IDRange) int { return cmp.Compare(a.First, b.First) })
	return out, nil
}
