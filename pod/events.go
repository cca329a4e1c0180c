package pod

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// eventsKept bounds how far a reader may be behind, and how much is told again to one that comes back.
	eventsKept = 1024
	// eventsAge is how long an event is kept. A kubelet that lost its stream comes back within seconds.
	eventsAge = 2 * time.Minute
	// eventsAgain is how far back a reader begins in any case: longer than what was sent lies unread in a socket.
	eventsAgain = 30 * time.Second
)

// eventLog is what GetContainerEvents tells: a sequence, of which the last ones are kept. A reader has no queue of
// its own, only a place in the sequence: one that does not read costs nothing and stalls nobody, and is sent away
// once it has fallen behind what is kept.
//
// The CRI gives a reader no way to say what it has seen, and what was sent may not have been read. So a reader begins with
// what no reader was there to hear, and with all of the last moments whoever heard it: it is told at least once, and the
// kubelet drops what it knows by created_at.
type eventLog struct {
	mu      sync.Mutex
	events  []*runtimeapi.ContainerEventResponse // the last ones; the youngest has the number seq
	seq     uint64
	readers int
	heard   uint64        // up to here some reader was told
	grown   chan struct{} // closed and replaced at each event
}

func newEventLog() *eventLog { return &eventLog{grown: make(chan struct{})} }

// add appends the event that build makes. It is built under the lock, so that a later event never carries an older
// status: the kubelet takes the status with the youngest created_at for the truth.
func (l *eventLog) add(build func() *runtimeapi.ContainerEventResponse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	event, now := build(), time.Now()
	event.CreatedAt = now.UnixNano()
	l.seq++
	l.events = append(l.events, event)
	drop := max(0, len(l.events)-eventsKept)
	for drop < len(l.events) && now.UnixNano()-l.events[drop].GetCreatedAt() > int64(eventsAge) {
		drop++
	}
	l.events = slices.Delete(l.events, 0, drop)
	close(l.grown)
	l.grown = make(chan struct{})
}

// join returns the place from which a new reader reads.
func (l *eventLog) join() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	oldest, at := l.seq-uint64(len(l.events)), l.seq
	if l.readers == 0 {
		at = max(l.heard, oldest)
	}
	l.readers++
	since := time.Now().Add(-eventsAgain).UnixNano()
	for at > oldest && l.events[at-oldest-1].GetCreatedAt() > since {
		at--
	}
	return at
}

// leave takes a reader off that was told everything up to at.
func (l *eventLog) leave(at uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readers--
	l.heard = max(l.heard, at)
}

// after returns the events past at, and a channel that is closed by the next one. ok is false where some of them
// are kept no more.
func (l *eventLog) after(at uint64) (events []*runtimeapi.ContainerEventResponse, grown <-chan struct{}, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	oldest := l.seq - uint64(len(l.events))
	if at < oldest {
		return nil, nil, false
	}
	return slices.Clone(l.events[at-oldest:]), l.grown, true
}

// follow sends events until ctx ends, send fails or the reader has fallen behind.
func (l *eventLog) follow(ctx context.Context, send func(*runtimeapi.ContainerEventResponse) error) error {
	at := l.join()
	defer func() { l.leave(at) }()
	for {
		events, grown, ok := l.after(at)
		if !ok {
			return tooMuch("container events: this reader is more than %d events or %s behind, and some are lost to it; "+
				"list the pods and containers, and read again", eventsKept, eventsAge)
		}
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
			at++
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return fmt.Errorf("container events: %w", context.Cause(ctx))
		}
	}
}

// GetContainerEvents tells when pods and containers are created, start, stop and are deleted, each time with the
// status of the pod and of its containers, until the caller goes. A pod is told of under its own id.
func (s *Service) GetContainerEvents(_ *runtimeapi.GetEventsRequest, out runtimeapi.RuntimeService_GetContainerEventsServer) error {
	return grpcError(s.events.follow(out.Context(), out.Send))
}

// publish tells of a pod, or of one of its containers, whose id is given.
func (s *Service) publish(kind runtimeapi.ContainerEventType, p *pod, id string) {
	s.events.add(func() *runtimeapi.ContainerEventResponse {
		return &runtimeapi.ContainerEventResponse{
			ContainerId: id, ContainerEventType: kind, PodSandboxStatus: p.view(), ContainersStatuses: s.containerViews(p),
		}
	})
}

// told is what a container calls after its transitions.
func (s *Service) told(c *container, kind runtimeapi.ContainerEventType) {
	if _, p := s.index.observed(c.spec.PodID); p != nil {
		s.publish(kind, p, c.spec.ID)
	}
}
