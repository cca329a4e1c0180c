package images

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// patience is the time that one registry or mirror may cost one pull: waits.patience in all. Two things take of it, each
// once however many layers wait at the same time: pauses before something is asked for again, whether the registry named
// them (Retry-After) or we chose them, and waiting for the network. Of the latter each waits.least bytes of a layer give
// waits.stall back, and so do each layer and each document for themselves. So a pull has an end, whatever the registry
// does: waits.patience, and the time that its size, as the manifest declares it, takes at the least rate.
type patience struct {
	waits waits

	mu                sync.Mutex
	pausing, awaiting int // how many do so now
	since             time.Time
	paused            time.Duration
	unpaid            time.Duration // of waiting for the network, by what came
	over              bool          // what was left was not enough
	last              string        // what the registry said last when it was not what was asked for
}

// countLocked brings the sums up to now.
func (p *patience) countLocked() {
	now := time.Now()
	switch {
	case p.pausing > 0:
		p.paused += now.Sub(p.since)
	case p.awaiting > 0:
		p.unpaid += now.Sub(p.since)
	}
	p.since = now
}

// await counts until done is called.
func (p *patience) await() (done func()) { return p.add(&p.awaiting) }

func (p *patience) add(to *int) (done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	*to++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.countLocked()
		*to--
	}
}

// rewarded is called for bytes that came and were not had before.
func (p *patience) rewarded(bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	p.unpaid = max(0, p.unpaid-p.waits.stall*time.Duration(bytes)/time.Duration(p.waits.least))
}

// pause sleeps. Ask grants first.
func (p *patience) pause(ctx context.Context, d time.Duration) error {
	defer p.add(&p.pausing)()
	return sleep(ctx, d)
}

// grants tells whether there is time for a pause. Where there is not, the pull is over.
func (p *patience) grants(d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	p.over = p.over || d > p.waits.retryAfter || d >= p.waits.patience-p.paused-p.unpaid
	return !p.over
}

// heard keeps what the registry said.
func (p *patience) heard(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = what
}

// gone is the error when the pull is over.
func (p *patience) gone() error {
	if p.grants(0) {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, errStall)
}

// advice goes with the errors of a pull that was given up.
func (p *patience) advice() string {
	if p.grants(0) {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	said := ""
	if p.last != "" {
		said = "; the last that it said: " + p.last
	}
	return fmt.Sprintf(" (a pull waits for a registry %v in all, and for no more than %v at a time%s: pull again later, with credentials where it grants more "+
		"to those, or set a mirror for it under registries)", p.waits.patience, p.waits.retryAfter, said)
}
