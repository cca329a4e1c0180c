package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// These tests are in the time of a bubble, with the waits that a user has.

// answers are a registry's.
type answers func(req *http.Request) *http.Response

func (a answers) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Context().Err() != nil {
		return nil, context.Cause(req.Context())
	}
	return a(req), nil
}

// paced is a body that brings so many bytes each time, and may end early.
type paced struct {
	ctx   context.Context
	chunk int
	every time.Duration
	left  int64
}

func (p *paced) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	if err := sleep(p.ctx, p.every); err != nil {
		return 0, err
	}
	n := min(int64(len(b)), int64(p.chunk), p.left)
	p.left -= n
	return int(n), nil
}

func (p *paced) Close() error { return nil }

// part answers a request for a blob of a size by what is still asked for of it.
func part(req *http.Request, size int64, body *paced) *http.Response {
	var from int64
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: -1, Request: req, Body: body}
	if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &from); err == nil {
		resp.StatusCode = http.StatusPartialContent
		resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, size-1, size))
	}
	body.ctx = req.Context()
	if body.left == 0 {
		body.left = size - from
	}
	return resp
}

func remoteOf(registry answers) *remote {
	p := &patience{waits: defaultWaits}
	return &remote{at: endpoint{host: "registry.example", path: "app"}, base: &url.URL{Scheme: "https", Host: "registry.example"}, patience: p, secret: &scrubber{},
		client: &http.Client{Transport: &retrier{next: &guard{next: registry, patience: p}, patience: p, retries: registryRetries}}}
}

// fetchAll reads a blob to its end.
func fetchAll(r *remote, size int64) error {
	b, err := r.blob(context.Background(), sum(nil), size)
	if err != nil {
		return err
	}
	defer b.Close()
	_, err = io.Copy(io.Discard, b)
	return err
}

const mib = 1 << 20

// TestATrickleIsGivenUp, one that is cut each minute and never gets on, and one that gets on just enough to be asked again.
func TestATrickleIsGivenUp(t *testing.T) {
	for name, every := range map[string]time.Duration{"5 KiB a minute": 12 * time.Second, "25 KiB a minute": 2400 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				err := fetchAll(remoteOf(func(req *http.Request) *http.Response { return part(req, 64*mib, &paced{chunk: 1 << 10, every: every}) }), 64*mib)
				if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "too little came for too long") {
					t.Errorf("error = %v", err)
				}
				if took := time.Since(start); took > 30*time.Minute {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// TestASlowLineServes: what counts is what the layers of a pull get together, here 75 KiB a minute.
func TestASlowLineServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := remoteOf(func(req *http.Request) *http.Response {
			return part(req, 4*mib, &paced{chunk: 1 << 10, every: 2400 * time.Millisecond})
		})
		var layers sync.WaitGroup
		for range 3 {
			layers.Go(func() {
				if err := fetchAll(r, 4*mib); err != nil {
					t.Error(err)
				}
			})
		}
		layers.Wait()
	})
}

// TestPausesHaveAnEnd: a registry that gives a little of a layer, then wants to be left alone for a minute three times, and
// so on, gets no more than ten minutes.
func TestPausesHaveAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		r := remoteOf(func(req *http.Request) *http.Response {
			if asked++; asked%4 != 1 {
				return &http.Response{StatusCode: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"60"}}, Request: req,
					Body: io.NopCloser(strings.NewReader(`{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`))}
			}
			return part(req, 64*mib, &paced{chunk: 128 << 10, left: 128 << 10})
		})
		start := time.Now()
		err := fetchAll(r, 64*mib)
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("error = %v", err)
		}
		for _, word := range []string{"registry.example", "429", "slow down", "10m0s in all", "ask again in 1m0s", "pull again later", "mirror"} {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%v: it does not say %q", err, word)
			}
		}
		if took := time.Since(start); took > defaultWaits.patience+time.Minute {
			t.Errorf("it took %v", took)
		}
	})
}

// TestPausesCountOnce, however many layers wait at the same time, and waiting for the network is paid for by what comes.
func TestPausesCountOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &patience{waits: defaultWaits}
		var layers sync.WaitGroup
		for range 5 {
			layers.Go(func() {
				if err := p.pause(context.Background(), 4*time.Minute); err != nil {
					t.Error(err)
				}
			})
		}
		layers.Wait()
		for range 100 {
			done := p.await()
			time.Sleep(59 * time.Second)
			done()
			p.rewarded(defaultWaits.least)
		}
		if p.paused != 4*time.Minute || p.unpaid != 0 {
			t.Errorf("%v and %v", p.paused, p.unpaid)
		}
		defer p.await()()
		time.Sleep(6*time.Minute - 1)
		if p.gone() != nil || p.advice() != "" {
			t.Error("it is gone too early")
		}
		time.Sleep(time.Nanosecond)
		if p.gone() == nil || p.advice() == "" {
			t.Error("it is never gone")
		}
	})
}
