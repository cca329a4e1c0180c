package cgroupv2

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// NodeGroup is the cgroup of a running node, seen from outside by the process that entered it.
type NodeGroup struct {
	delegation group
	node       group
	door       group    // a leaf beside node, only there while a process of ours has nowhere else to stand
	origin     group    // where this process came from
	starter    int      // the pid of the process that started us and shares our origin, else 0
	added      []string // controllers that Enter enabled in delegation

	leaving sync.Mutex // one Leave at a time
}

// groupPrefix begins the name of each node's cgroup.
const groupPrefix = "coracle-"

func newNodeGroup(d Delegation, node string) *NodeGroup {
	parent := group(d.Path)
	return &NodeGroup{delegation: parent, node: parent.join(groupPrefix + node), door: parent.join(groupPrefix + node + ".door")}
}

// Path is the absolute directory of the node's cgroup. A start-up record that keeps Dir(Path) is enough for a
// later RemoveStale, whatever cgroup the later process is in.
func (g *NodeGroup) Path() string { return string(g.node) }

// NodePath is the directory that Enter makes for the node: recorded before, it tells RemoveStale of an Enter that was
// cut off.
func (d Delegation) NodePath(node string) string { return string(newNodeGroup(d, node).node) }

// NodeName is the name that NodePath made a path of.
func NodeName(nodePath string) string {
	return strings.TrimPrefix(filepath.Base(nodePath), groupPrefix)
}

// Enter makes Path/coracle-<node>, moves this process into it and enables the delegation's controllers for it. A
// cgroup of that name from a crash is killed and removed first: the caller holds the node's lock. Processes
// started from now on are born there.
//
// The caller then starts the namespaces (the cgroup namespace's root becomes coracle-<node>) and moves itself on
// to a leaf, supervisor, since a cgroup with processes can enable nothing for the pods.
func (d Delegation) Enter(node string) (_ *NodeGroup, err error) {
	if d.Path == "" {
		return nil, fmt.Errorf("enter cgroup: %w", ErrNoDelegation)
	}
	h := thisHost()
	pl, err := h.locate()
	if err != nil {
		return nil, fmt.Errorf("enter cgroup: %w", err)
	}
	if err := RemoveStale(d, node); err != nil {
		return nil, err
	}
	g := newNodeGroup(d, node)
	g.origin, g.starter = group(pl.dir(pl.own)), h.starter
	var back undo
	defer func() {
		if err != nil {
			err = fmt.Errorf("enter cgroup: %w", back.run(err))
		}
	}()
	if _, err := g.node.mkdir(); err != nil {
		return nil, err
	}
	back.push(g.node.rmdir)
	if err := g.node.take(self); err != nil {
		return nil, err
	}
	back.push(func() error { return g.origin.take(self) })
	if len(d.Controllers) > 0 {
		back.push(g.giveBack)
		if err := g.claim(d.Controllers); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// claim enables the controllers in the delegation.
func (g *NodeGroup) claim(controllers []string) error {
	if err := g.moveStarter(); err != nil {
		return err
	}
	added, err := g.delegation.enable(controllers)
	g.added = added
	if errors.Is(err, ErrInternalProcesses) {
		return err
	}
	// A controller that the kernel refuses by itself (cpu, where real-time threads exist) is missing in the
	// node's root and so in Tree.Controllers, which Status shows: the node works without it.
	return nil
}

// moveStarter: the process that started us and waits for us to be ready (`up --detach`) would be in the way where it
// is in the delegation's own cgroup: it goes to the door. In a scope of the user's systemd it is not: we moved alone.
func (g *NodeGroup) moveStarter() error {
	if g.starter == 0 {
		return nil
	}
	pids, err := g.delegation.procs()
	if err != nil || !slices.Contains(pids, g.starter) {
		return err
	}
	if _, err := g.door.mkdir(); err != nil {
		return err
	}
	if err := g.door.take(strconv.Itoa(g.starter)); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// Leave moves this process back to where it came from, kills what is left of the node and removes its cgroups.
// It returns within some ten seconds. Idempotent.
func (g *NodeGroup) Leave() error {
	g.leaving.Lock()
	defer g.leaving.Unlock()
	if err := g.stepOut(); err != nil {
		return fmt.Errorf("leave cgroup: %w", err)
	}
	err := errors.Join(g.node.remove(time.Now().Add(removeDeadline)), g.giveBack())
	if err != nil {
		return fmt.Errorf("leave cgroup: %w", err)
	}
	return nil
}

// stepOut brings this process out of the node's cgroups, where it would kill itself: to its origin or, as long
// as controllers are enabled there, to the door.
func (g *NodeGroup) stepOut() error {
	pl, err := thisHost().locate()
	if err != nil {
		return err
	}
	if !within(g.node, group(pl.dir(pl.own))) {
		return nil
	}
	if g.origin.take(self) == nil {
		return nil
	}
	if _, err := g.door.mkdir(); err != nil {
		return err
	}
	return g.door.take(self)
}

// giveBack disables the controllers that the node needed, and empties and removes the door.
func (g *NodeGroup) giveBack() error {
	errs := []error{g.disableUnused()}
	if g.door.exists() {
		pids, err := g.door.procs()
		errs = append(errs, err)
		for _, pid := range pids {
			errs = append(errs, g.sendHome(pid))
		}
		errs = append(errs, g.door.rmdir())
	}
	return errors.Join(errs...)
}

// sendHome moves a process to the origin or, where that was removed meanwhile, to the delegation.
func (g *NodeGroup) sendHome(pid int) error {
	err := g.origin.take(strconv.Itoa(pid))
	if gone(err) {
		err = g.delegation.take(strconv.Itoa(pid))
	}
	if errors.Is(err, unix.ESRCH) { // it ended
		return nil
	}
	return err
}

// disableUnused takes back the controllers of the delegation that no node uses any more: those that we added or,
// where nobody else's cgroup is in it, all. Left enabled they would keep every process out of that cgroup
// (EBUSY), the next start of a node too.
func (g *NodeGroup) disableUnused() error {
	below, err := g.delegation.children()
	if err != nil {
		return err
	}
	alone := true
	for _, child := range below {
		if child == g.door || child == g.node {
			continue
		}
		alone = false
		if strings.HasPrefix(filepath.Base(string(child)), groupPrefix) {
			return nil // another node's
		}
	}
	unused := g.added
	if alone {
		if unused, err = g.delegation.inForce(); err != nil {
			return err
		}
	}
	return g.delegation.disable(unused)
}

// RemoveStale removes what a crashed node left in the delegation: its processes, its cgroups and, where nobody
// else is there, the controllers that it had enabled. Only d.Path is used. The caller holds the node's lock, so
// that no live node is hit. Idempotent.
func RemoveStale(d Delegation, node string) error {
	if err := checkName(node); err != nil {
		return fmt.Errorf("remove stale cgroup: %w", err)
	}
	g := newNodeGroup(d, node)
	if d.Path == "" || (!g.node.exists() && !g.door.exists()) {
		return nil
	}
	pl, err := thisHost().locate()
	if err != nil {
		return fmt.Errorf("remove stale cgroup: %w", err)
	}
	if pl.found && within(g.node, group(pl.dir(pl.own))) {
		return fmt.Errorf("remove stale cgroup %s: this process is in it", g.node)
	}
	g.origin = g.delegation
	if err := errors.Join(g.node.remove(time.Now().Add(removeDeadline)), g.giveBack()); err != nil {
		return fmt.Errorf("remove stale cgroup: %w", err)
	}
	return nil
}

// within tells whether the directory in is dir or below it.
func within(dir, in group) bool {
	return in == dir || strings.HasPrefix(string(in), string(dir)+"/")
}
