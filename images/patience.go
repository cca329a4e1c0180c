package images

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// patience is the time that one registry or mirror may cost one pull. Two things are counted, each once however many
// layers wait at the same time: pauses before something is asked for again, whether the registry named them (Retry-After)
// or we chose them, all of which are spent; and waiting for the network, where waits.stall is free for each waits.least
// bytes of a layer, for each layer and for each document that comes, and more than that is spent. When waits.patience is
// spent, the pull is given up. So a pull has an end, whatever the registry does: waits.patience and the time that its
// size, as the manifest declares it, takes at the least rate.
type patience struct {
	waits waits

	mu                sync.Mutex
	pausing, awaiting int // how many do so now
	since             time.Time
	unpaid            time.Duration // of waiting for the network, since something came
	spent             time.Duration
	last              string // what the registry said last when it was not what was asked for
}

// count brings the sums up to now.
func (p *patience) countLocked() {
	now := time.Now()
	switch {
	case p.pausing > 0:
		p.spent += now.Sub(p.since)
	case p.awaiting > 0:
		p.unpaid += now.Sub(p.since)
	}
	p.since = now
}

func (p *patience) leftLocked() time.Duration {
	return p.waits.patience - p.spent - max(0, p.unpaid-p.waits.stall)
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

// rewarded is called for what came and was not had before.
func (p *patience) rewarded() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	p.spent += max(0, p.unpaid-p.waits.stall)
	p.unpaid = 0
}

// pause sleeps. Ask allows first.
func (p *patience) pause(ctx context.Context, d time.Duration) error {
	defer p.add(&p.pausing)()
	return sleep(ctx, d)
}

// allows tells whether there is time to wait for d.
func (p *patience) allows(d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.countLocked()
	return d <= p.leftLocked()
}

// heard keeps what the registry said.
func (p *patience) heard(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = what
}

// gone is the error when nothing is left.
func (p *patience) gone() error {
	if p.allows(1) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == "" {
		return fmt.Errorf("%w: too little came for too long", ErrUnavailable)
	}
	return fmt.Errorf("%w: the last that it said: %s", ErrUnavailable, p.last)
}

// advice is for the errors of a pull that was given up.
func (p *patience) advice() string {
	if p.allows(1) {
		return ""
	}
	return fmt.Sprintf(" (given up after more than %v of waiting for it in all; pull again later, with credentials where it grants more to those, "+
		"or set a mirror for it under registries)", p.waits.patience)
}
