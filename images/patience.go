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
// waits.stall back; and each layer that is whole, and each document, give as much back of either. So a pull has an end,
// whatever the registry does: waits.patience, and the time that its size, as the manifest declares it, takes at the least
// rate. A layer's bytes that come again, since a server knows no ranges, count for blobRetries attempts at most.
type patience struct {
	waits waits

	mu                sync.Mutex
	pausing, awaiting int // how many do so now
	since             time.Time
	paused            time.Duration // and not paid back
	unpaid            time.Duration // of waiting for the network, by what came
	refused           bool          // a pause that was too long
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

// rewarded is called for a layer's bytes that came.
func (p *patience) rewarded(bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	p.unpaid = max(0, p.unpaid-p.waits.stall*time.Duration(bytes)/time.Duration(p.waits.least))
}

// Write is rewarded for what is to be thrown away.
func (p *patience) Write(b []byte) (int, error) {
	p.rewarded(len(b))
	return len(b), nil
}

// completed is called for each layer and each document that came to its end.
func (p *patience) completed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	left := max(0, p.waits.stall-p.paused)
	p.paused = max(0, p.paused-p.waits.stall)
	p.unpaid = max(0, p.unpaid-left)
}

// pause sleeps. Ask grants first.
func (p *patience) pause(ctx context.Context, d time.Duration) error {
	defer p.add(&p.pausing)()
	return sleep(ctx, d)
}

// grants tells whether there is time for a pause. Where there is not, it is the end of what is asked for, and not of what
// else is under way and comes.
func (p *patience) grants(d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d <= p.waits.retryAfter && d < p.leftLocked() {
		return true
	}
	p.refused = true
	return false
}

func (p *patience) leftLocked() time.Duration {
	p.countLocked()
	return p.waits.patience - p.paused - p.unpaid
}

// heard keeps what the registry said.
func (p *patience) heard(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = what
}

// gone is the error when nothing is left.
func (p *patience) gone() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leftLocked() > 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, errStall)
}

// advice goes with the errors of a pull that was given up.
func (p *patience) advice() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.refused && p.leftLocked() > 0 {
		return ""
	}
	said := ""
	if p.last != "" {
		said = "; the last that it said: " + p.last
	}
	return fmt.Sprintf(" (a pull waits for a registry %v in all, and for no more than %v at a time%s: pull again later, with credentials where it grants more "+
		"to those, or set a mirror for it under registries)", p.waits.patience, p.waits.retryAfter, said)
}
