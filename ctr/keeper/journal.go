package keeper

import (
	"context"
	"slices"
	"sync"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// journalSize is how many events are kept for a daemon that comes back. An exit that is older is told from the
// container itself as long as that is not deleted.
const journalSize = 1024

// journal is the sequence of events of this keeper's life.
type journal struct {
	mu     sync.Mutex
	events []wire.Event // the last ones, ascending
	seq    uint64       // of the last event
	grown  chan struct{}
}

func newJournal() *journal { return &journal{grown: make(chan struct{})} }

// append adds an event and wakes who waits; it returns the event's sequence.
func (j *journal) append(kind string, state wire.State) uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seq++
	j.events = append(j.events, wire.Event{Seq: j.seq, Type: kind, State: state})
	if len(j.events) > journalSize {
		j.events = slices.Delete(j.events, 0, len(j.events)-journalSize)
	}
	close(j.grown)
	j.grown = make(chan struct{})
	return j.seq
}

// after returns the events past since, the sequence before the oldest kept one, and a channel that is closed by
// the next event.
func (j *journal) after(since uint64) (events []wire.Event, horizon uint64, grown <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	horizon = j.seq - uint64(len(j.events))
	for i, e := range j.events {
		if e.Seq > since {
			return slices.Clone(j.events[i:]), horizon, j.grown
		}
	}
	return nil, horizon, j.grown
}

func (j *journal) last() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.seq
}

// follow tells every event past since, the old ones first, until tell fails or ctx ends.
func (k *Keeper) follow(ctx context.Context, since uint64, tell func(wire.Event) error) error {
	for {
		events, horizon, grown := k.journal.after(since)
		if since < horizon {
			events = append(k.exitsBetween(since, horizon), events...)
		}
		for _, e := range events {
			if err := tell(e); err != nil {
				return err
			}
			since = e.Seq
		}
		since = max(since, horizon)
		select {
		case <-grown:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// exitsBetween rebuilds the exits that the journal has let go, since < seq <= until.
func (k *Keeper) exitsBetween(since, until uint64) []wire.Event {
	k.mu.Lock()
	defer k.mu.Unlock()
	var events []wire.Event
	for _, c := range k.containers {
		c.mu.Lock()
		if c.seq > since && c.seq <= until {
			events = append(events, wire.Event{Seq: c.seq, Type: wire.EventExit, State: c.state})
		}
		c.mu.Unlock()
	}
	slices.SortFunc(events, func(a, b wire.Event) int { return int(a.Seq) - int(b.Seq) })
	return events
}
