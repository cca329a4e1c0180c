package keeper

import (
	"context"
	"sync"
)

// gate counts those who are at work that must not be cut off in the middle. Shut, it lets nobody in, and those who come
// wait until it is open again.
type gate struct {
	mu     sync.Mutex
	inside int
	opened chan struct{} // closed when the gate opens again; nil while it is open
	left   chan struct{} // closed when the last one has gone; nil while nobody waits for that
}

func (g *gate) enter() {
	for {
		g.mu.Lock()
		opened := g.opened
		if opened == nil {
			g.inside++
			g.mu.Unlock()
			return
		}
		g.mu.Unlock()
		<-opened
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside--
	if g.inside == 0 && g.left != nil {
		close(g.left)
		g.left = nil
	}
}

// shut waits until nobody is inside. On an error, the context's, the gate is open again. One caller at a time.
func (g *gate) shut(ctx context.Context) error {
	g.mu.Lock()
	g.opened = make(chan struct{})
	if g.inside == 0 {
		g.mu.Unlock()
		return nil
	}
	left := make(chan struct{})
	g.left = left
	g.mu.Unlock()
	select {
	case <-left:
		return nil
	case <-ctx.Done():
		g.open()
		return context.Cause(ctx)
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened != nil {
		close(g.opened)
	}
	g.opened, g.left = nil, nil
}
