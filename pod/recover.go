package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// recoverAll builds the index from the disk and the keeper's facts, and gives back what nobody owns any more.
// A thing that cannot be given back does not keep the node from starting: it is logged, and tried again when its
// pod is stopped or removed.
func (s *Service) recoverAll(ctx context.Context) (seq uint64, err error) {
	info, err := s.deps.Containers.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("ask the keeper: %w", err)
	}
	if err := s.loadPods(ctx, info.BootID); err != nil {
		return 0, err
	}
	unknown, err := s.loadContainers(ctx)
	if err != nil {
		return 0, err
	}
	if seq, err = s.adopt(ctx); err != nil {
		return 0, fmt.Errorf("take over containers: %w", err)
	}
	for _, c := range unknown {
		if st := c.status.snapshot(); st.StartedAt.IsZero() && st.FinishedAt.IsZero() { // the keeper does not know it either
			s.recorded(c.spec.ID, c.lost("its status was lost with the node's runtime directory"))
		}
	}
	s.sweep(ctx, info.BootID)
	return seq, nil
}

func (s *Service) loadPods(ctx context.Context, boot string) error {
	specs, err := loadAll[podSpec](s.store, filepath.Join(s.store.data, "pods"))
	if err != nil {
		return err
	}
	for id, spec := range specs {
		dir := s.store.podDir(id)
		_, statErr := os.Lstat(dir)
		if err := s.store.makeDir(dir); err != nil {
			return err
		}
		status, known := loadStatus[podStatus](s.store, statusPath(dir))
		p := newPod(spec, dir, status)
		if !known {
			status = s.podFacts(p, boot, statErr == nil)
			p = newPod(spec, dir, status)
		}
		p.announced.Store(true) // by the daemon before
		p.stopTold.Store(!status.StoppedAt.IsZero())
		if !known {
			s.recorded(id, p.status.save()) // a full disk must not keep the daemon, which could make room, from starting
		}
		if !p.visible() {
			s.log("take back half-made pod", id, s.takeBack(ctx, p))
			continue
		}
		s.index.addPod(p)
	}
	return nil
}

// podFacts makes a status of what there is of the pod, where its own is lost. Where its directory is lost too, the
// runtime directory went with the machine's boot, or with the user's last session.
func (s *Service) podFacts(p *pod, boot string, inThisLife bool) podStatus {
	// The pod was ready before: a spec whose making was cut off has a status, or none of its parts.
	status := podStatus{ReadyAt: p.spec.CreatedAt}
	if inThisLife && s.deps.Cgroups.Usable() {
		// Making it again tells its path.
		cgroup, err := s.deps.Cgroups.MakePod(p.spec.Config.GetLinux().GetCgroupParent(), p.spec.ID)
		s.log("find the pod's cgroup", p.spec.ID, err)
		status.Cgroup = cgroup
	}
	if kinds := p.ownNamespaces().kinds; len(kinds) == 0 || !pinned(kinds[0].pin) {
		status.StoppedAt = time.Now()
		return status
	}
	status.BootID = boot
	if !p.hostNetwork() {
		ips, err := podAddresses(p.nsPath("net"))
		s.log("find the pod's addresses", p.spec.ID, err)
		if len(ips) > 0 {
			status.IP, status.AdditionalIPs = ips[0], ips[1:]
		}
	}
	return status
}

// takeBack undoes RunPodSandbox for a daemon that died in it.
func (s *Service) takeBack(ctx context.Context, p *pod) error {
	if err := s.releasePod(ctx, p); err != nil {
		return err
	}
	cgroup := p.status.snapshot().Cgroup
	if cgroup == "" && s.deps.Cgroups.Usable() {
		// The daemon may have died between making it and recording it. Making it again tells its path; where that
		// fails, as for a parent that cannot be, it could not be made before either.
		cgroup, _ = s.deps.Cgroups.MakePod(p.spec.Config.GetLinux().GetCgroupParent(), p.spec.ID)
	}
	if cgroup != "" {
		if err := s.deps.Cgroups.RemovePod(cgroup); err != nil {
			return err
		}
	}
	return s.forget(p)
}

// forget deletes the records of a pod that was never there. The spec goes first: without its status it would be that of a
// pod that was ready before the machine's boot, while a directory without a spec is swept.
func (s *Service) forget(p *pod) error {
	return errors.Join(remove(s.store.podSpecPath(p.spec.ID)), removeDir(p.dir))
}

// loadContainers returns those of which neither a status nor a history is left.
func (s *Service) loadContainers(ctx context.Context) (unknown []*container, err error) {
	specs, err := loadAll[containerSpec](s.store, filepath.Join(s.store.data, "containers"))
	if err != nil {
		return nil, err
	}
	for id, spec := range specs {
		if _, owner := s.index.observed(spec.PodID); owner == nil {
			s.log("take back container without a pod", id,
				errors.Join(s.sweepContainer(ctx, &spec), remove(s.store.containerSpecPath(id))))
			continue
		}
		dir := s.store.containerDir(id)
		if err := s.store.makeDir(dir); err != nil {
			return nil, err
		}
		status, known := loadStatus[containerStatus](s.store, statusPath(dir))
		if !known {
			status, known = loadStatus[containerStatus](s.store, s.store.history.path(id))
		}
		c := s.newContainer(spec, status)
		s.index.addContainer(c)
		if !known {
			unknown = append(unknown, c)
		}
	}
	return unknown, nil
}

// sweep gives back what no record owns: processes, mounts, directories, addresses, cgroups.
func (s *Service) sweep(ctx context.Context, boot string) {
	livePods, liveMounts := map[string]bool{}, map[string]bool{}
	for _, p := range s.index.allPods() {
		st := p.status.snapshot()
		if st.BootID != boot && !st.Released {
			// Its processes and namespaces died with the node; its address and its records did not.
			s.log("release pod of an earlier node", p.spec.ID, s.releasePod(ctx, p))
		}
		if !p.status.snapshot().Released {
			livePods[p.spec.ID] = true
		}
	}
	for _, c := range s.index.allContainers("") {
		liveMounts[c.spec.ID] = true
		for owner := range c.spec.imageVolumes() {
			liveMounts[owner] = true
		}
	}
	s.sweepProcesses(ctx)
	s.log("sweep history", "", s.store.history.sweep(func(id string) bool {
		c, _ := s.index.observed(id)
		return c != nil
	}, s.store.setAside))
	s.sweepDirs("pods", func(dir string) error { return errors.Join(unmountPodDir(dir), s.sweepCgroup(dir)) })
	s.sweepDirs("containers", func(dir string) error { return unpin(filepath.Join(dir, "pid")) })
	s.log("reconcile network", "", s.deps.Network.Reconcile(ctx, livePods))
	s.log("reconcile root filesystems", "", s.deps.Images.Reconcile(liveMounts))
}

func (s *Service) sweepProcesses(ctx context.Context) {
	states, err := s.deps.Containers.List(ctx)
	s.log("list the keeper's containers", "", err)
	for _, st := range states {
		if c, p := s.index.observed(st.ID); c == nil && p == nil {
			s.log("delete container without a record", st.ID, s.deps.Containers.Delete(ctx, st.ID))
		}
	}
}

// sweepDirs deletes directories of the runtime directory that belong to nothing.
func (s *Service) sweepDirs(kind string, unmount func(dir string) error) {
	parent := filepath.Join(s.store.run, kind)
	entries, err := os.ReadDir(parent)
	s.log("list state directories", "", err)
	for _, e := range entries {
		if c, p := s.index.observed(e.Name()); c != nil || p != nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(s.store.data, kind, e.Name()+".json")); err == nil {
			continue // of one that could not be taken back: its status says what it is, when that is tried again
		}
		dir := filepath.Join(parent, e.Name())
		err := unmount(dir)
		if err == nil {
			err = removeDir(dir)
		}
		s.log("delete state directory without a record", e.Name(), err)
	}
}

// sweepCgroup removes the cgroup of a pod of which only the status is left.
func (s *Service) sweepCgroup(dir string) error {
	status, err := loadRecord[podStatus](statusPath(dir))
	if err != nil || status.Cgroup == "" || !s.deps.Cgroups.Usable() {
		return nil // nothing is known of one
	}
	return s.deps.Cgroups.RemovePod(status.Cgroup)
}

// log says what recovery did to an object, or could not do.
func (s *Service) log(what, id string, err error) {
	switch {
	case err != nil:
		s.cfg.Log.Error(what, "id", id, "error", err)
	case id != "":
		s.cfg.Log.Info(what, "id", id)
	}
}
