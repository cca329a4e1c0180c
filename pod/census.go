package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/ctr"
)

// Stats without cgroups.
//
// Where no cgroup is delegated, or none with the memory controller, the kernel counts nothing for a container, and
// without numbers crictl hides it, `kubectl top` does not know it and nobody notices what eats the machine. What /proc
// tells of its processes is less, but true:
//
//   - CPU time is what its living processes have used, and what those of their children had that have ended. Missing is
//     the time of a process that ended and that nobody waited for, and of a command that was executed in the container
//     and has ended. So it is a lower bound, which is kept from going back (cpuMeter).
//   - The working set, and RSS, are memory that is resident now, with pages shared by several processes divided among
//     them. Missing are page cache that nobody has mapped and what the kernel holds for the container.
//
// Everything else is left out: usage with page cache, what is available, faults, swap, pressure.

// census lists processes by whom they belong to: the id of a container, or of the pod whose pause process it is.
type census map[string][]ctr.Process

// takeCensus finds out by the mount namespace, which every container has for itself, and by descent, for zombies and for
// those who have made themselves a namespace.
func (s *Service) takeCensus() (census, error) {
	all, err := ctr.AllProcesses()
	if err != nil {
		return nil, err
	}
	byPid := make(map[int]ctr.Process, len(all))
	for _, p := range all {
		byPid[p.Pid] = p
	}
	owners := owners{byPid: byPid, pids: map[int]string{}, namespaces: map[uint64]string{}, node: ctr.MountNS(os.Getpid())}
	for _, c := range s.index.allContainers("") {
		if st := c.status.snapshot(); st.running() && !s.sandboxed(c) {
			owners.add(c.spec.ID, st.Pid, st.PidStart)
		}
	}
	for _, p := range s.index.allPods() {
		if st := p.status.snapshot(); st.ready() && st.PausePid != 0 {
			owners.pids[st.PausePid] = p.spec.ID
		}
	}
	found := census{}
	for _, p := range all {
		if id := owners.of(p); id != "" {
			found[id] = append(found[id], p)
		}
	}
	return found, nil
}

// sandboxed: the process that stands for the container is a program of the runtime's, which waits for it.
func (s *Service) sandboxed(c *container) bool {
	_, p := s.index.observed(c.spec.PodID)
	return p != nil && p.spec.Sandboxed
}

// owners tells whom a process belongs to.
type owners struct {
	byPid      map[int]ctr.Process
	pids       map[int]string    // by pid, "" for nobody
	namespaces map[uint64]string // by mount namespace
	node       uint64            // the mount namespace in which no container is
}

// add takes in a container by its first process, if that still is the one that was started.
func (o *owners) add(id string, pid int, start uint64) {
	p, ok := o.byPid[pid]
	if !ok || p.Start != start {
		return
	}
	o.pids[pid] = id
	if p.MountNS != 0 && p.MountNS != o.node {
		o.namespaces[p.MountNS] = id
	}
}

func (o *owners) of(p ctr.Process) string {
	if id, known := o.pids[p.Pid]; known {
		return id
	}
	o.pids[p.Pid] = "" // should two claim to be each other's parent: pids may be taken again while we look
	id := o.namespaces[p.MountNS]
	if parent, ok := o.byPid[p.Parent]; id == "" && ok {
		id = o.of(parent)
	}
	o.pids[p.Pid] = id
	return id
}

// living are the processes without the zombies, as the kernel lists them in cgroup.procs.
func (c census) living(id string) []int {
	var pids []int
	for _, p := range c[id] {
		if !p.Zombie {
			pids = append(pids, p.Pid)
		}
	}
	return pids
}

// list lists the processes of a container that runs.
func (v *survey) list(c *container, r *reading) (err error) {
	if r.pids != nil || r.at.IsZero() {
		return nil
	}
	if cgroup := c.cgroup(); cgroup != "" {
		r.pids, err = v.deps.Cgroups.Processes(cgroup)
		if errors.Is(err, cgroupv2.ErrNotFound) {
			err = nil // it has ended
		}
		return err
	}
	all, err := v.census()
	r.pids = all.living(c.spec.ID)
	return err
}

// estimate fills in from /proc what the kernel did not count for the container. Of one without a process there is
// nothing to tell: it has just ended.
func (v *survey) estimate(c *container, r *reading) error {
	if r.stats.CPU.Usage == nil {
		all, err := v.census()
		if err != nil {
			return err
		}
		var used time.Duration
		for _, p := range all[c.spec.ID] {
			used += p.CPU
		}
		if len(all[c.spec.ID]) > 0 {
			nanos := uint64(used)
			r.stats.CPU.Usage = &nanos
		}
	}
	if r.stats.Memory.Usage != nil {
		return nil
	}
	if err := v.list(c, r); err != nil || len(r.pids) == 0 {
		return err
	}
	if err := c.memory.renew(r.pids); err != nil {
		return fmt.Errorf("estimate memory of container %s: %w", c.spec.ID, err)
	}
	c.memory.tell(r)
	return nil
}

// memoryEstimate is what the processes of a container had in memory when that was found out last. The kernel walks all
// their page tables for it: 30 µs for a small process, 15 ms for a gigabyte. So it is asked again only after estimateRest
// times as long: whoever asks how often, a container costs 0.2 % of a CPU at most, and the age of the number is told.
type memoryEstimate struct {
	mu   sync.Mutex // guards what is below; held while /proc is read, since who asks meanwhile wants the same answer
	at   time.Time
	took time.Duration
	// nil where a process may not be looked into: a part of the sum would be a lie.
	resident, anonymous *uint64
}

const estimateRest = 500

func (m *memoryEstimate) renew(pids []int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	began := time.Now()
	if began.Sub(m.at) < estimateRest*m.took {
		return nil
	}
	resident, anonymous := uint64(0), uint64(0)
	sum, anon := &resident, &anonymous
	for _, pid := range pids {
		r, a, err := ctr.ProcessMemory(pid)
		if errors.Is(err, fs.ErrPermission) {
			sum, anon = nil, nil
			break
		}
		if err != nil {
			return err
		}
		resident, anonymous = resident+r, anonymous+a
	}
	m.at, m.took, m.resident, m.anonymous = began, time.Since(began), sum, anon
	return nil
}

func (m *memoryEstimate) tell(r *reading) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r.memoryAt, r.stats.Memory.WorkingSet, r.stats.Memory.RSS = m.at, m.resident, m.anonymous
}
