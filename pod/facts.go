package pod

import (
	"context"
	"errors"
	"time"

	"github.com/coracle-cri/coracle/ctr"
)

// Pauses between attempts to reach the keeper again.
const (
	retryFirst = 50 * time.Millisecond
	retryLast  = 2 * time.Second
)

// watch keeps the snapshots true until ctx ends. After a loss of the keeper's connection it asks for what it
// missed: by the sequence of events, and by the list of what is.
//
// A panic on the way is such a loss, too: what it was about may be taken in by the list, and if not, one container's state
// is not told while all others are. To let it end the daemon would help nobody: the next one meets the same fact as it
// starts.
func (s *Service) watch(ctx context.Context, since uint64) {
	pause := retryFirst
	for ctx.Err() == nil {
		err := guarded(s.cfg.Log, func() error {
			return s.deps.Containers.Events(ctx, since, func(e ctr.Event) error {
				since, pause = e.Seq, retryFirst
				s.observe(e.State)
				return nil
			})
		})
		if ctx.Err() != nil {
			return
		}
		s.cfg.Log.Warn("keeper's events broke off", "error", err, "again in", pause)
		if !sleep(ctx, pause) {
			return
		}
		pause = min(2*pause, retryLast)
		err = guarded(s.cfg.Log, func() error {
			seq, err := s.adopt(ctx)
			if err == nil {
				since = seq
			}
			return err
		})
		if err != nil {
			s.cfg.Log.Warn("keeper's facts are not taken in", "error", err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// observe takes in one fact.
func (s *Service) observe(state ctr.State) {
	c, p := s.index.observed(state.ID)
	switch {
	case c != nil:
		s.recorded(state.ID, c.observe(state))
	case p != nil && state.Exited():
		s.stopped(p) // the pause process holds the pid namespace: without it no container can start
	}
}

// keeperFacts is what the keeper told at one time.
type keeperFacts struct {
	asked  time.Time // what began later is not in states
	boot   string
	states map[string]ctr.State
}

// adopt settles every pod and container by the keeper's facts, and returns the sequence they stand for. It runs
// at start-up, and when the keeper was lost and found.
func (s *Service) adopt(ctx context.Context) (seq uint64, err error) {
	facts := keeperFacts{asked: time.Now(), states: map[string]ctr.State{}}
	info, err := s.deps.Containers.Info(ctx)
	if err != nil {
		return 0, err
	}
	list, err := s.deps.Containers.List(ctx)
	if err != nil {
		return 0, err
	}
	for _, st := range list {
		facts.states[st.ID] = st
	}
	facts.boot = info.BootID
	s.boot.Store(&info.BootID)
	var errs []error
	for _, p := range s.index.allPods() {
		errs = append(errs, guarded(s.cfg.Log, func() error { s.settlePod(p, facts); return nil }))
	}
	for _, c := range s.index.allContainers("") {
		errs = append(errs, guarded(s.cfg.Log, func() error { return s.settleContainer(ctx, c, facts) }))
	}
	return info.Seq, errors.Join(errs...)
}

// settlePod finds out whether a pod that was ready still is.
func (s *Service) settlePod(p *pod, facts keeperFacts) {
	st := p.status.snapshot()
	if !st.ready() || st.ReadyAt.After(facts.asked) {
		return
	}
	alive := st.BootID == facts.boot
	if alive && p.hasPause() {
		pause, known := facts.states[p.spec.ID]
		alive = known && pause.Running()
	}
	if pause, known := facts.states[p.spec.ID]; known && st.PausePid == 0 { // the pod's status was lost
		s.recorded(p.spec.ID, p.status.fact(func(st *podStatus) { st.PausePid = pause.Pid }))
	}
	for _, k := range p.ownNamespaces().kinds {
		alive = alive && pinned(k.pin)
	}
	if alive {
		return
	}
	s.cfg.Log.Warn("pod is not ready any more: its node, its pause process or its namespaces are gone", "pod", p.spec.ID)
	s.stopped(p)
}

// settleContainer takes in what happened unseen. What the keeper knows counts, on whatever boot it was told.
func (s *Service) settleContainer(ctx context.Context, c *container, facts keeperFacts) error {
	state, known := facts.states[c.spec.ID]
	st := c.status.snapshot()
	switch {
	case known && (state.StartedAt.IsZero() || !state.Exited() && !st.FinishedAt.IsZero()):
		// A daemon died between create and start, or could not tell the keeper to end what it gave up.
		return s.discard(ctx, c)
	case known:
		s.recorded(c.spec.ID, c.observe(state))
	case st.running() && st.StartedAt.Before(facts.asked):
		why := "the keeper has no record of the container"
		if _, p := s.index.observed(c.spec.PodID); p != nil && p.status.snapshot().BootID != facts.boot {
			why = "the node that it ran on ended"
		}
		s.recorded(c.spec.ID, c.lost(why))
	}
	return nil
}

// discard deletes the process of a container, unless an operation is at work on it: that one will see to it.
func (s *Service) discard(ctx context.Context, c *container) error {
	_, p := s.index.observed(c.spec.PodID)
	if p == nil || !p.op.tryLock() {
		return nil
	}
	defer p.op.unlock()
	return s.deps.Containers.Delete(ctx, c.spec.ID)
}
