package pod

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// eventReader is a client of GetContainerEvents: what it does not take from got, it has not read.
type eventReader struct {
	grpc.ServerStream
	ctx  context.Context
	got  chan *runtimeapi.ContainerEventResponse
	busy chan struct{} // gets one when an event is about to be sent
	end  context.CancelCauseFunc
	done chan error
}

func (r *eventReader) Context() context.Context { return r.ctx }

func (r *eventReader) Send(e *runtimeapi.ContainerEventResponse) error {
	select {
	case r.busy <- struct{}{}:
	default:
	}
	select {
	case r.got <- e:
		return nil
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
}

func (h *harness) readEvents() *eventReader {
	r := &eventReader{got: make(chan *runtimeapi.ContainerEventResponse), busy: make(chan struct{}, 1), done: make(chan error, 1)}
	r.ctx, r.end = context.WithCancelCause(h.ctx())
	joined := h.events.readersNow()
	go func() { r.done <- h.GetContainerEvents(&runtimeapi.GetEventsRequest{}, r) }()
	eventually(h.t, func() bool { return h.events.readersNow() > joined })
	return r
}

func (l *eventLog) readersNow() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.readers
}

// age makes every event older.
func (l *eventLog) age(by time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range l.events {
		old := proto.CloneOf(e) // a reader may have it
		old.CreatedAt -= int64(by)
		l.events[i] = old
	}
}

// leave ends the reader and returns what the call said.
func (r *eventReader) leave(cause error) error {
	r.end(cause)
	return <-r.done
}

// next reads one event: its type, and of what it is.
func (r *eventReader) next(t *testing.T) *runtimeapi.ContainerEventResponse {
	t.Helper()
	select {
	case e := <-r.got:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event came")
		return nil
	}
}

func (r *eventReader) want(t *testing.T, id string, kinds ...string) (last *runtimeapi.ContainerEventResponse) {
	t.Helper()
	for _, kind := range kinds {
		last = r.next(t)
		if got := strings.TrimSuffix(strings.TrimPrefix(last.ContainerEventType.String(), "CONTAINER_"), "_EVENT"); got != kind || last.ContainerId != id {
			t.Fatalf("event %s of %.8s, want %s of %.8s", got, last.ContainerId, kind, id)
		}
		if last.CreatedAt <= 0 || last.PodSandboxStatus.GetMetadata().GetName() != "p" {
			t.Errorf("event %v", last)
		}
	}
	return last
}

// states are the containers of an event with their states.
func states(e *runtimeapi.ContainerEventResponse) string {
	var out []string
	for _, c := range e.ContainersStatuses {
		out = append(out, fmt.Sprintf("%s %s", c.Metadata.Name, stateName(c.State)))
	}
	return strings.Join(out, ", ")
}

func TestEventsTellALife(t *testing.T) {
	h := newHarness(t)
	r := h.readEvents()
	defer func() { wantCode(t, r.leave(nil), codes.Canceled) }()
	pod := h.run(h.podConfig("p"))
	r.want(t, pod, "CREATED", "STARTED")
	id := h.create(pod, shell("c", "exit 3"))
	if e := r.want(t, id, "CREATED"); states(e) != "c created" {
		t.Errorf("created: %s", states(e))
	}
	h.start(id)
	r.want(t, id, "STARTED")
	e := r.want(t, id, "STOPPED")
	if states(e) != "c exited" || e.ContainersStatuses[0].ExitCode != 3 || e.PodSandboxStatus.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("stopped: %v", e)
	}
	if _, err := h.RemoveContainer(h.ctx(), &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	if e := r.want(t, id, "DELETED"); states(e) != "" {
		t.Errorf("deleted: %s", states(e))
	}
	for range 2 {
		if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	if e := r.want(t, pod, "STOPPED"); e.PodSandboxStatus.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pod: %v", e.PodSandboxStatus)
	}
	if _, err := h.RemovePodSandbox(h.ctx(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	// A sandbox that is gone is told with its metadata: the kubelet finds its pod by that.
	r.want(t, pod, "DELETED")
	bad := h.podConfig("p")
	bad.Hostname = "no/name"
	if _, err := h.tryRun(bad); err == nil {
		t.Fatal("a bad pod was made")
	}
	h.network.set("attach", errors.New("no network"))
	if _, err := h.tryRun(h.podConfig("p")); err == nil {
		t.Fatal("a pod without network was made")
	}
	h.network.set("attach", nil)
	// Nothing is told of what never was.
	r.want(t, h.run(h.podConfig("p")), "CREATED", "STARTED")
}

// TestEventsAreToldAgain: a reader that comes back hears what happened while nobody listened, in order, and what was sent
// a moment ago; one that comes beside another begins with the last moments.
func TestEventsAreToldAgain(t *testing.T) {
	h := newHarness(t)
	r := h.readEvents()
	pod := h.run(h.podConfig("p"))
	r.want(t, pod, "CREATED", "STARTED")
	h.events.age(2 * eventsAgain)
	wantCode(t, r.leave(nil), codes.Canceled)
	id := h.launchIn(pod, "c", "exit 0")
	h.exited(id)
	h.events.age(2 * eventsAgain)
	r = h.readEvents()
	beside := h.readEvents()
	r.want(t, id, "CREATED", "STARTED", "STOPPED") // and not what the first has heard
	second := h.create(pod, shell("second", "sleep 100"))
	r.want(t, second, "CREATED")
	beside.want(t, second, "CREATED")
	wantCode(t, beside.leave(nil), codes.Canceled)
	wantCode(t, r.leave(nil), codes.Canceled)
	// What was sent a moment ago may not have been read.
	r = h.readEvents()
	r.want(t, second, "CREATED")
	wantCode(t, r.leave(nil), codes.Canceled)

	// What a daemon finds out when it comes back is told to the first who asks.
	h.start(second)
	h.restart(func() {
		p, err := h.keeper.proc(second)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.keeper.Kill(h.ctx(), second, 9, true); err != nil {
			t.Fatal(err)
		}
		<-p.done
	})
	r = h.readEvents()
	if e := r.want(t, second, "STOPPED"); states(e) != "c exited, second exited" {
		t.Errorf("after the restart: %s", states(e))
	}
	// The server ends the stream by its context.
	err := r.leave(status.Error(codes.Unavailable, "the daemon is shutting down"))
	wantCode(t, err, codes.Unavailable)
}

// TestEventsDoNotWait: a reader that does not read stalls nobody, and is told that it missed something.
func TestEventsDoNotWait(t *testing.T) {
	h := newHarness(t)
	slow := h.readEvents()
	pod := h.run(h.podConfig("p"))
	_, p := h.index.observed(pod)
	<-slow.busy // it is being sent the first, and has taken no more than two
	for range eventsKept + 2 {
		h.publish(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, p, pod)
	}
	for {
		select {
		case <-slow.got: // what it was just being sent
			continue
		case err := <-slow.done:
			wantCode(t, err, codes.ResourceExhausted)
		}
		break
	}
	if n := len(h.events.events); n != eventsKept {
		t.Errorf("%d events are kept", n)
	}
	h.events.age(2 * eventsAge)
	h.publish(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, p, pod)
	if n := len(h.events.events); n != 1 {
		t.Errorf("%d events are kept of which all but one are old", n)
	}
	fresh := h.readEvents()
	fresh.want(t, pod, "STARTED")
	wantCode(t, fresh.leave(nil), codes.Canceled)
}
