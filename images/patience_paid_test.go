package images

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// busy asks to be left alone for so many seconds.
func busy(req *http.Request, seconds string) *http.Response {
	return &http.Response{StatusCode: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {seconds}}, Request: req, Body: io.NopCloser(strings.NewReader("{}"))}
}

// TestAPauseTooLongIsOneRequestsEnd: what is under way beside it, and comes well, comes whole.
func TestAPauseTooLongIsOneRequestsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		r := remoteOf(func(req *http.Request) *http.Response {
			if asked++; asked == 1 {
				return part(req, 64*mib, &paced{chunk: 16 << 10, every: 100 * time.Millisecond})
			}
			return busy(req, "300")
		})
		var layers sync.WaitGroup
		layers.Go(func() {
			if err := fetchAll(r, 64*mib); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := fetchAll(r, mib); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "ask again in 5m0s") {
			t.Errorf("error = %v", err)
		}
		layers.Wait()
	})
}

// whole is an answer of a server that knows no ranges.
func whole(req *http.Request, body *paced) *http.Response {
	body.ctx = req.Context()
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: -1, Request: req, Body: body}
}

// TestALayerIsCutWithoutRanges: the first part of it takes half an hour again.
func TestALayerIsCutWithoutRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		r := remoteOf(func(req *http.Request) *http.Response {
			body := &paced{chunk: 16 << 10, every: time.Second / 32, left: 1024 * mib}
			if asked++; asked == 1 {
				body.left = 924 * mib
			}
			return whole(req, body)
		})
		if err := fetchAll(r, 1024*mib); err != nil || asked != 2 {
			t.Errorf("asked %d times: %v", asked, err)
		}
	})
}

// TestSkippingHasAnEnd: each attempt brings a little more, and all before again.
func TestSkippingHasAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, start := int64(0), time.Now()
		err := fetchAll(remoteOf(func(req *http.Request) *http.Response {
			asked++
			return whole(req, &paced{chunk: 8 << 10, every: 5 * time.Second, left: asked * mib})
		}), 1024*mib)
		if !errors.Is(err, ErrUnavailable) || asked != blobRetries+2 {
			t.Errorf("after %d attempts and %v: %v", asked, time.Since(start), err)
		}
	})
}

// TestLayersPayForPauses: each of sixty is had after three.
func TestLayersPayForPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		r := remoteOf(func(req *http.Request) *http.Response {
			if asked++; asked%4 != 0 {
				return busy(req, "4")
			}
			return part(req, mib, &paced{chunk: 16 << 10, every: time.Second / 32})
		})
		for i := range 60 {
			if err := fetchAll(r, mib); err != nil {
				t.Fatalf("layer %d: %v", i, err)
			}
		}
	})
}

// TestASlowDocument comes; one that would take longer than the patience does not.
func TestASlowDocument(t *testing.T) {
	for name, c := range map[string]struct {
		every time.Duration
		whole bool
	}{"0.93 KB/s": {1100 * time.Millisecond, true}, "20 bytes a second": {51 * time.Second, false}, "silent": {3 * time.Minute, false}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				r := remoteOf(func(req *http.Request) *http.Response {
					return whole(req, &paced{chunk: 1 << 10, every: c.every, left: 100 << 10})
				})
				body, _, err := r.get(context.Background(), "blobs", sum(nil), "")
				if c.whole && (err != nil || len(body) != 100<<10) || !c.whole && !errors.Is(err, ErrUnavailable) {
					t.Errorf("%d bytes, %v", len(body), err)
				}
				if took := time.Since(start); took > defaultWaits.patience+2*time.Minute {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}
