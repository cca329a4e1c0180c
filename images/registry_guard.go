package images

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// handshakeLimit bounds the answer to the handshake, which is read to its end and not looked at.
const handshakeLimit = 64 << 10

// errStall is the cause of a request that was given up because nothing came any more, or hardly anything.
var errStall = errors.New("too little came for too long")

// guard ends requests whose answer stops coming, whoever reads it, and counts what is waited. The header's time is bounded
// by the transport.
type guard struct {
	next     http.RoundTripper
	patience *patience
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := g.patience.gone(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	done := g.patience.await()
	resp, err := g.next.RoundTrip(req.WithContext(ctx))
	done()
	if err != nil {
		// The transport's own limits look like the caller's deadline (net.Error, net/http), and are none.
		if errors.Is(err, context.DeadlineExceeded) && req.Context().Err() == nil {
			err = errors.Join(errStall, err)
		}
		cancel(nil)
		return nil, err
	}
	body := &stallBody{body: resp.Body, r: resp.Body, patience: g.patience, least: g.patience.waits.least, ctx: ctx, cancel: cancel}
	if req.Context().Value(layerKey{}) == nil {
		body.least /= documentShare
	}
	if strings.HasSuffix(req.URL.Path, "/v2/") {
		body.r = io.LimitReader(resp.Body, handshakeLimit)
	}
	resp.Body = body
	return resp, nil
}

// layerKey marks the context of a request for a layer, which is resumed where it is cut. The value is a *bool: it becomes
// true where a pause before that is too long.
type layerKey struct{}

// documentShare is which part of a layer's least rate is enough for a document (17 bytes a second): it would begin anew, and
// has to come within the patience in any case.
const documentShare = 64

// stallBody cancels its request where less than least comes in waits.stall: a server that holds on to us, or a line
// that another attempt may find better. Only the time spent waiting in Read counts: a reader
// that is slow itself, since the disk is, does not.
type stallBody struct {
	body     io.Closer
	r        io.Reader
	patience *patience
	least    int
	ctx      context.Context
	cancel   context.CancelCauseFunc
	spent    time.Duration // since the last progress
	got      int           // since then
}

func (s *stallBody) Read(p []byte) (int, error) {
	start, done := time.Now(), s.patience.await()
	t := time.AfterFunc(s.patience.waits.stall-s.spent, func() { s.cancel(errStall) })
	n, err := s.r.Read(p)
	t.Stop()
	done()
	s.spent += time.Since(start)
	if s.got += n; s.got >= s.least {
		s.spent, s.got = 0, 0
		if err == nil { // it may all be what was had before
			err = s.patience.gone()
		}
	}
	if cause := context.Cause(s.ctx); cause != nil && err != nil && !errors.Is(err, io.EOF) {
		err = errors.Join(err, cause)
	}
	return n, err
}

func (s *stallBody) Close() error {
	s.cancel(nil)
	return s.body.Close()
}

// witness keeps what is shown to servers, so that no message that quotes it is passed on.
type witness struct {
	next   http.RoundTripper
	secret *scrubber
}

func (w *witness) RoundTrip(req *http.Request) (*http.Response, error) {
	if _, credentials, ok := strings.Cut(req.Header.Get("Authorization"), " "); ok {
		w.secret.add(credentials)
	}
	return w.next.RoundTrip(req)
}

// minSecret is the shortest text that is taken out of messages for being a secret: a shorter one is in every word.
const minSecret = 4

// scrubber takes secrets out of text.
type scrubber struct {
	mu      sync.Mutex
	secrets []string
}

func (s *scrubber) add(secrets ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, secret := range secrets {
		if len(secret) >= minSecret {
			s.secrets = appendNew(s.secrets, secret)
		}
	}
}

func appendNew(list []string, s string) []string {
	for _, have := range list {
		if have == s {
			return list
		}
	}
	return append(list, s)
}

func (s *scrubber) clean(text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, secret := range s.secrets {
		text = strings.ReplaceAll(text, secret, "[redacted]")
	}
	return text
}
