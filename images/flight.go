package images

import (
	"context"
	"log/slog"
	"sync"
)

// flightGroup makes concurrent calls for one key share one piece of work. Unlike x/sync/singleflight the work
// belongs to nobody: it goes on while anybody waits for it, and is cancelled when the last one leaves.
type flightGroup[T any] struct {
	log *slog.Logger

	mu      sync.Mutex
	flights map[string]*flight[T]
}

type flight[T any] struct {
	done    chan struct{}
	cancel  context.CancelFunc
	waiters int // guarded by flightGroup.mu
	val     T   // written before done is closed
	err     error
}

// do runs fn for key, or joins the run that is under way. It blocks until the work ends or ctx does; the last
// one to leave waits until the work has cleaned up after itself. joined tells that another caller's fn ran.
// fn runs with values of the first caller's context and a cancellation of its own.
func (g *flightGroup[T]) do(ctx context.Context, key string, fn func(context.Context) (T, error)) (val T, joined bool, err error) {
	g.mu.Lock()
	if g.flights == nil {
		g.flights = map[string]*flight[T]{}
	}
	f, joined := g.flights[key]
	if joined {
		f.waiters++
	} else {
		workCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight[T]{done: make(chan struct{}), cancel: cancel, waiters: 1}
		g.flights[key] = f
		go func() {
			f.err = guarded(g.log, func() (err error) {
				f.val, err = fn(workCtx)
				return err
			})
			g.leave(key, f, true)
			close(f.done)
			cancel()
		}()
	}
	g.mu.Unlock()

	select {
	case <-f.done:
		return f.val, joined, f.err
	case <-ctx.Done():
	}
	if g.leave(key, f, false) {
		<-f.done
	}
	return val, joined, context.Cause(ctx)
}

// leave counts a waiter out. The last one cancels the work and takes the key, so that a later caller starts
// afresh instead of joining work that is being given up.
func (g *flightGroup[T]) leave(key string, f *flight[T], finished bool) (last bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !finished {
		f.waiters--
	}
	last = f.waiters == 0
	if (finished || last) && g.flights[key] == f {
		delete(g.flights, key)
	}
	if last {
		f.cancel()
	}
	return last
}
