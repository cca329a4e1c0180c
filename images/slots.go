package images

import (
	"context"
	"sync"
)

// slots bounds how many layers come in at once from one host. A layer holds its slot from the first request to the last
// byte, most of that time waiting for the network, so a host has its own: one that is slow holds up who pulls from it, and
// nobody else. What the bound protects is the host and the line to it. The work on this side needs none of its own: it
// waits for what comes, the decompressors stop a few buffers ahead of the writer, and Go runs as many of them at once as
// there are processors.
type slots struct {
	each int

	mu    sync.Mutex
	hosts map[string]*hostSlots
}

type hostSlots struct {
	tokens chan struct{}
	users  int // that have a token or wait for one; guarded by slots.mu
}

// take waits for a slot of the host. Call release once, where there is no error.
func (s *slots) take(ctx context.Context, host string) (release func(), err error) {
	h := s.join(host)
	select {
	case h.tokens <- struct{}{}:
		return func() {
			<-h.tokens
			s.leave(host, h)
		}, nil
	case <-ctx.Done():
		s.leave(host, h)
		return nil, context.Cause(ctx)
	}
}

func (s *slots) join(host string) *hostSlots {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hosts[host]
	if h == nil {
		h = &hostSlots{tokens: make(chan struct{}, s.each)}
		if s.hosts == nil {
			s.hosts = map[string]*hostSlots{}
		}
		s.hosts[host] = h
	}
	h.users++
	return h
}

func (s *slots) leave(host string, h *hostSlots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.users--; h.users == 0 {
		delete(s.hosts, host)
	}
}

// busy tells that a layer is coming in.
func (s *slots) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.hosts {
		if len(h.tokens) > 0 {
			return true
		}
	}
	return false
}
