package images

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	headerLimit = 1 << 20 // bytes of the header of an answer
	// The registry itself is asked again more often than a mirror, since after a mirror there is somebody else.
	registryRetries = 4
	mirrorRetries   = 1
)

// transports keeps a connection pool for each way in which a registry, and what it leads to, is reached.
type transports struct {
	waits  waits
	lookUp func(host string) (RegistryConfig, bool) // finds a host's own section

	mu      sync.Mutex
	pool    map[endpoint]*http.Transport // keyed without repository
	reaches map[string]*reach            // by registry host
}

// get returns the pool for an endpoint; a CA file is read when its pool is made.
func (t *transports) get(at endpoint) (*http.Transport, error) {
	key := endpoint{host: at.host, insecure: at.insecure, caFile: at.caFile}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tr := t.pool[key]; tr != nil {
		return tr, nil
	}
	tlsConfig, err := tlsFor(at)
	if err != nil {
		return nil, err
	}
	reach := t.reachLocked(at.host)
	tr := &http.Transport{
		Proxy:                  reach.proxy,
		DialContext:            reach.dial,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    t.waits.dial,
		ResponseHeaderTimeout:  t.waits.header,
		MaxResponseHeaderBytes: headerLimit,
		ForceAttemptHTTP2:      true,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        30 * time.Second,
		// A blob is hashed as it was stored: nothing may be decompressed on the way.
		DisableCompression: true,
	}
	if t.pool == nil {
		t.pool = map[endpoint]*http.Transport{}
	}
	t.pool[key] = tr
	return tr, nil
}

// reachLocked returns the one judge of where a registry leads, for all of its pools.
func (t *transports) reachLocked(host string) *reach {
	r := t.reaches[host]
	if r == nil {
		r = newReach(host, t.waits.dial, func(host string) bool {
			_, ok := t.lookUp(host)
			return ok
		})
		if t.reaches == nil {
			t.reaches = map[string]*reach{}
		}
		t.reaches[host] = r
	}
	return r
}

func (t *transports) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tr := range t.pool {
		tr.CloseIdleConnections()
	}
}

func tlsFor(at endpoint) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: at.insecure && at.caFile == ""}
	if at.caFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(at.caFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: read caFile: %w", ErrInvalid, at, err)
	}
	if c.RootCAs, err = x509.SystemCertPool(); err != nil {
		c.RootCAs = x509.NewCertPool()
	}
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%w: %s: caFile %s holds no certificate", ErrInvalid, at, at.caFile)
	}
	return c, nil
}

// cloner gives the authenticating layers below a request of their own. They write the Authorization header into
// it; without this http.Client would copy that header to wherever it is redirected on the same host or below it. Nor
// does the next host learn the whole URL that led to it, with the signature that storage may have in it.
type cloner struct{ next http.RoundTripper }

func (c *cloner) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Header.Del("Referer")
	return c.next.RoundTrip(req)
}

// checkRedirect follows to other hosts, as registries that keep blobs in object storage need, but does not let a
// registry outside point us, or our proxy, at addresses of our own network; reach does the same for names.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	from, to := via[0].URL.Hostname(), req.URL.Hostname()
	if from != to && isInside(to) && !isInside(from) {
		return fmt.Errorf("%w: redirect from %s to the private address %s", errMisled, from, to)
	}
	return nil
}

func isInside(host string) bool {
	if isLoopback(host) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && nearnessOf(ip) != farAway
}

// retrier repeats requests that the server or the network failed, waiting longer each time, or as long as the
// server asks. What the waits add up to is bounded by the patience.
type retrier struct {
	next     http.RoundTripper
	patience *patience
	retries  int
}

func (r *retrier) RoundTrip(req *http.Request) (*http.Response, error) {
	for try := 0; ; try++ {
		resp, err := r.next.RoundTrip(req)
		again := err == nil && retryableStatus(resp.StatusCode) || retryableError(err)
		if !again || try >= r.retries || req.Body != nil && req.GetBody == nil {
			return resp, err
		}
		wait := r.patience.waits.step(try)
		if resp != nil {
			after := retryAfter(resp.Header)
			wait = max(wait, after)
			r.patience.heard(busyText(resp.StatusCode, after))
		} else {
			r.patience.heard(describe(err))
		}
		if !r.patience.grants(wait) {
			if refused, ok := req.Context().Value(layerKey{}).(*bool); ok {
				*refused = true
			}
			return resp, err
		}
		if resp != nil {
			_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
			resp.Body.Close()
		}
		if err := r.patience.pause(req.Context(), wait); err != nil {
			return nil, err
		}
		if req.GetBody != nil {
			req = req.Clone(req.Context())
			if req.Body, err = req.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

func busyText(status int, after time.Duration) string {
	text := fmt.Sprintf("status %d %s", status, http.StatusText(status))
	if after > 0 {
		text += fmt.Sprintf(", ask again in %v", after)
	}
	return text
}

// step is the pause before retry number n, with a quarter of jitter so that nodes do not come back in step.
func (w waits) step(n int) time.Duration {
	d := min(w.backoff<<min(n, 20), w.maxBackoff)
	return d + time.Duration(rand.Int64N(int64(d)/4+1))
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// retryAfter reads the header in both of its forms: seconds, and a date.
func retryAfter(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		return time.Duration(min(n, 1<<30)) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}

func retryableStatus(code int) bool {
	switch code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// retryableError tells a network that may be better in a moment from one that is set up wrongly.
func retryableError(err error) bool {
	if errors.Is(err, errStall) { // it shows as a cancelled request
		return true
	}
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsTemporary || dns.IsTimeout
	}
	var uerr *url.Error
	if errors.As(err, &uerr) {
		err = uerr.Err
	}
	var nerr net.Error
	return errors.As(err, &nerr) && nerr.Timeout()
}
