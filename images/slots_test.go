package images

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// slowHub has an image of more layers than a host has slots, of which it never sends more than the beginning.
func slowHub(t *testing.T, s *Store, shared *testLayer) (h *hub, begun chan struct{}) {
	t.Helper()
	h = newHub(t)
	layers := []*testLayer{shared}
	for i := range s.fetch.slots.each {
		layers = append(layers, gzipLayer(t, file(fmt.Sprint("slow", i), "x")))
	}
	img := imageOf(t, layers...)
	h.push(t, "app:1", img)
	config := mustConfig(t, img)
	begun = make(chan struct{}, 10*len(layers))
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") || strings.HasSuffix(r.URL.Path, config) {
			return false
		}
		send(w, []byte{0x1f})
		w.(http.Flusher).Flush()
		begun <- struct{}{}
		<-r.Context().Done()
		return true
	})
	return h, begun
}

// TestASlowRegistryHoldsUpNobodyElse: neither who pulls from another, nor who pulls a layer there that the slow one claims to
// have, nor the writing out of what came from there.
func TestASlowRegistryHoldsUpNobodyElse(t *testing.T) {
	s := openStore(t, Config{})
	s.cfg.waits.stall, s.cfg.waits.patience = time.Hour, time.Hour
	shared := gzipLayer(t, file("shared", "x"))
	slow, begun := slowHub(t, s, shared)
	fast := newHub(t)
	fast.push(t, "app:1", imageOf(t, shared, gzipLayer(t, file("own", "x"))))

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pulled := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, slow.host+"/app:1", nil)
		pulled <- err
	}()
	for range s.fetch.slots.each {
		<-begun
	}
	soon, done := context.WithTimeout(context.Background(), 20*time.Second)
	defer done()
	if _, err := s.Pull(soon, fast.host+"/app:1", nil); err != nil {
		t.Errorf("a pull from another registry: %v", err)
	} else {
		waitSynced(t, s)
	}
	if !s.fetch.slots.busy() {
		t.Error("the slow registry's layers are not counted")
	}
	cancel()
	if err := <-pulled; !errors.Is(err, context.Canceled) {
		t.Errorf("the slow pull: %v", err)
	}
	if s.fetch.slots.busy() || len(s.fetch.slots.hosts) > 0 {
		t.Errorf("slots left: %v", s.fetch.slots.hosts)
	}
}

// TestSlotsOfAHost: so many at a time and no more, and who gives up waiting leaves nothing.
func TestSlotsOfAHost(t *testing.T) {
	s := slots{each: 2}
	ctx, cancel := context.WithCancel(context.Background())
	var give []func()
	for _, host := range []string{"a", "a", "b", "b"} {
		release, err := s.take(ctx, host)
		if err != nil {
			t.Fatal(err)
		}
		give = append(give, release)
	}
	third := make(chan error, 1)
	go func() {
		_, err := s.take(ctx, "a")
		third <- err
	}()
	select {
	case err := <-third:
		t.Fatalf("a third has a slot: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	cancel()
	if err := <-third; !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	for _, release := range give {
		release()
	}
	if s.busy() || len(s.hosts) > 0 {
		t.Errorf("left: %v", s.hosts)
	}
}
