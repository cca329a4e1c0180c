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

// transports keeps one connection pool for each way of reaching a host.
type transports struct {
	waits waits
	named func(host string) bool // tells hosts that the configuration has a section for

	mu   sync.Mutex
	pool map[endpoint]*http.Transport // keyed without repository
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
	reach := newReach(at.host, t.waits.dial, t.named)
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
		return fmt.Errorf("redirect from %s to the private address %s refused", from, to)
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

// schemeGuard keeps requests off plain http, which the handshake would otherwise try for private addresses, and
// with them credentials.
type schemeGuard struct {
	next     http.RoundTripper
	insecure bool
}

func (g *schemeGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme == "http" && !g.insecure {
		return nil, fmt.Errorf("%s: plain http is not allowed: set insecure for it in the registries section", req.URL.Host)
	}
	return g.next.RoundTrip(req)
}

// retrier repeats requests that the server or the network failed, waiting longer each time, or as long as the
// server asks. What the waits add up to is bounded by the request's context and the number of retries.
type retrier struct {
	next    http.RoundTripper
	waits   waits
	retries int
}

func (r *retrier) RoundTrip(req *http.Request) (*http.Response, error) {
	for try := 0; ; try++ {
		resp, err := r.next.RoundTrip(req)
		again := err == nil && retryableStatus(resp.StatusCode) || retryableError(err)
		if !again || try >= r.retries || req.Body != nil && req.GetBody == nil {
			return resp, err
		}
		wait := r.waits.step(try)
		if resp != nil {
			after := retryAfter(resp.Header)
			if after > r.waits.retryAfter {
				return resp, nil
			}
			wait = max(wait, after)
			_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
			resp.Body.Close()
		}
		if err := sleep(req.Context(), wait); err != nil {
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
