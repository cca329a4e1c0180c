package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"unicode"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	manifestLimit = 8 << 20 // bytes of a manifest, an index or a configuration
	maxRedirects  = 10
)

// endpoint is one place to ask for a repository: a mirror or the registry itself.
type endpoint struct {
	host     string // registry host, with port
	path     string // repository there
	insecure bool
	caFile   string
	mirror   bool
	of       string // the registry that a mirror stands for
}

func (e endpoint) String() string {
	if e.mirror {
		return "mirror " + e.host
	}
	return "registry " + e.host
}

// parseMirror reads "[http[s]://]host[:port][/prefix]".
func parseMirror(s string) (endpoint, error) {
	e := endpoint{mirror: true}
	rest, isHTTP := strings.CutPrefix(s, "http://")
	if isHTTP {
		e.insecure = true
	} else {
		rest = strings.TrimPrefix(s, "https://")
	}
	e.host, e.path, _ = strings.Cut(strings.TrimSuffix(rest, "/"), "/")
	if _, err := name.NewRegistry(e.host, name.StrictValidation); err != nil || e.host == "" || strings.Contains(rest, "://") {
		if at := strings.LastIndexByte(s, '@'); at >= 0 {
			s = "…" + s[at:] // what is before it may be a password
		}
		return endpoint{}, fmt.Errorf("%w: mirror %q: want [http://]host[:port][/prefix]; credentials stand under the mirror's own host", ErrInvalid, s)
	}
	return e, nil
}

// endpoints lists where ref may be pulled from, in the order to try: a mirror keyed by registry host changes
// the place that is asked, never the image's name.
func (c *Config) endpoints(ref reference) ([]endpoint, error) {
	own := c.registryConfig(ref.Host)
	var out []endpoint
	for _, m := range c.mirrors(ref.Host) {
		e, err := parseMirror(m)
		if err != nil {
			return nil, err
		}
		e.path = strings.TrimPrefix(e.path+"/"+ref.Path, "/")
		rc := c.registryConfig(e.host)
		e.insecure = e.insecure || rc.Insecure || isLoopback(e.host)
		e.caFile, e.of = rc.CAFile, ref.Host
		out = append(out, e)
	}
	return append(out, endpoint{host: ref.Host, path: ref.Path, insecure: own.Insecure || isLoopback(ref.Host), caFile: own.CAFile}), nil
}

// remote talks to one repository at one endpoint. It is safe for concurrent use.
type remote struct {
	at       endpoint
	base     *url.URL // scheme and host, as the handshake found them
	client   *http.Client
	patience *patience
	secret   *scrubber
	note     string // what was wrong with the user's credentials files
}

// connect does the registry's handshake: which scheme it answers on, which authentication it wants, and a token
// where it gives those out. Who pulls once from one endpoint has one patience with it.
func (s *Store) connect(ctx context.Context, at endpoint, auth *Auth, retries int, p *patience) (*remote, error) {
	opts := []name.Option{name.StrictValidation}
	if at.insecure {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(at.host, opts...)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, at, err)
	}
	repo := reg.Repo(at.path)
	creds, helperNote, err := s.credentials(ctx, at, auth)
	if err != nil {
		return nil, err
	}
	r := &remote{at: at, patience: p, secret: newScrubber(creds), note: helperNote}
	if _, err := s.fetch.transports.get(at); err != nil { // a caFile that cannot be read is told as such
		return nil, err
	}
	guarded := &guard{next: &trust{pool: &s.fetch.transports, at: at}, patience: p}
	inner := &retrier{next: &witness{next: guarded, secret: r.secret}, patience: p, retries: retries}
	rt, err := transport.NewWithContext(ctx, repo.Registry, authn.FromConfig(creds), inner, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		if classify(err) == nil { // a handshake that makes no sense
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return nil, r.failed("connect", err)
	}
	r.client = &http.Client{Transport: &cloner{next: rt}, CheckRedirect: checkRedirect}
	// transport.NewWithContext rewrites the scheme for this host to the one that answered.
	r.base = &url.URL{Scheme: "https", Host: repo.RegistryStr()}
	return r, nil
}

func (r *remote) url(kind, id string) string {
	u := *r.base
	if r.at.mirror {
		// One mirror may stand for many registries with repositories of the same path. It is told as containerd tells it.
		u.RawQuery = url.Values{"ns": {r.at.of}}.Encode()
	}
	u.Path = "/v2/" + r.at.path + "/" + kind + "/" + id
	return u.String()
}

// get asks for a small document: a manifest or a configuration. One that is cut off is asked for again.
func (r *remote) get(ctx context.Context, kind, id, accept string) (body []byte, mediaType string, err error) {
	for try := 0; ; try++ {
		var cut bool
		body, mediaType, cut, err = r.getOnce(ctx, kind, id, accept)
		wait := r.patience.waits.step(try)
		if !cut || ctx.Err() != nil || try >= blobRetries || !r.patience.grants(wait) {
			return body, mediaType, err
		}
		if err := r.patience.pause(ctx, wait); err != nil {
			return nil, "", err
		}
	}
}

func (r *remote) getOnce(ctx context.Context, kind, id, accept string) (body []byte, mediaType string, cut bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url(kind, id), nil)
	if err != nil {
		return nil, "", false, fmt.Errorf("ask %s: %w", r.at, err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	what := "get " + strings.TrimSuffix(kind, "s") + " " + id
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, "", false, r.failed(what, err)
	}
	defer resp.Body.Close()
	if err := checkStatus(resp); err != nil {
		return nil, "", false, r.failed(what, err)
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, manifestLimit+1))
	if err != nil {
		return nil, "", true, r.failed(what, err)
	}
	if len(body) > manifestLimit {
		return nil, "", false, fmt.Errorf("%w: %s: %s is larger than %d bytes", ErrRefused, r.at, what, manifestLimit)
	}
	r.patience.completed()
	return body, resp.Header.Get("Content-Type"), false, nil
}

// errorPage is how much of the body of an error is looked at.
const errorPage = 32 << 10

// checkStatus makes an answer other than 200 an error, also where the rest of it does not come or does not end.
func checkStatus(resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	page := *resp
	page.Body = io.NopCloser(io.LimitReader(resp.Body, errorPage))
	err := transport.CheckError(&page, http.StatusOK)
	if terr := (*transport.Error)(nil); !errors.As(err, &terr) {
		return &transport.Error{StatusCode: resp.StatusCode}
	}
	return err
}

// failed turns what the HTTP layers say into an error of this package: the class for callers, the place, and a
// text without credentials, signed URLs or whole server pages.
func (r *remote) failed(what string, err error) error {
	class, text := classify(err), describe(err)
	if errors.Is(class, ErrDenied) && r.note != "" {
		text += " (" + r.note + ")"
	}
	if errors.Is(class, ErrUnavailable) {
		text += r.patience.advice()
	}
	text = r.secret.clean(text)
	if class == nil {
		return fmt.Errorf("%s: %s: %s", r.at, what, text)
	}
	return &remoteError{text: fmt.Sprintf("%s: %s: %s", r.at, what, text), class: class}
}

// remoteError keeps an error's class and drops the chain, which may hold what must not be shown.
type remoteError struct {
	text  string
	class error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.class }

// classify finds the class of an error from the HTTP layers, nil where there is none.
func classify(err error) error {
	if errors.Is(err, errStall) { // it shows as a cancelled request
		return ErrUnavailable
	}
	for _, class := range []error{ErrClosed, context.Canceled, context.DeadlineExceeded, ErrDigest, errMisled, ErrRefused, ErrUnavailable} {
		if errors.Is(err, class) {
			return class
		}
	}
	var terr *transport.Error
	if errors.As(err, &terr) {
		switch code := terr.StatusCode; {
		case code == http.StatusUnauthorized, code == http.StatusForbidden:
			return ErrDenied
		case code == http.StatusNotFound:
			return ErrNotFound
		case code == http.StatusTooManyRequests, code >= 500:
			return ErrUnavailable
		}
		return nil
	}
	if err != nil && (strings.Contains(err.Error(), "invalid realm") || strings.Contains(err.Error(), "refusing token-server redirect")) {
		return errMisled // the library's, which have no type: it does not go where it is led
	}
	var uerr *url.Error
	if errors.As(err, &uerr) || retryableError(err) {
		return ErrUnavailable
	}
	return nil
}

// describe is an error's text without what a registry or a URL may carry along: queries (storage behind a
// registry puts signatures there), user information, and pages of HTML.
func describe(err error) string {
	var terr *transport.Error
	if errors.As(err, &terr) {
		var parts []string
		for _, d := range terr.Errors {
			parts = append(parts, strings.TrimSpace(string(d.Code)+" "+d.Message))
		}
		text := fmt.Sprintf("status %d %s", terr.StatusCode, http.StatusText(terr.StatusCode))
		if len(parts) > 0 {
			text += ": " + strings.Join(parts, "; ")
		}
		return shorten(text)
	}
	var uerr *url.Error
	if errors.As(err, &uerr) {
		where := ""
		if u, parseErr := url.Parse(uerr.URL); parseErr == nil {
			where = bareURL(u.String()) + ": "
		}
		return where + describe(uerr.Err)
	}
	text := err.Error()
	if errors.Is(err, errStall) {
		text = errStall.Error()
	}
	if strings.Contains(text, "no token in bearer response") {
		return "the token server's answer holds no token" // the library quotes the answer, and with it what it does hold
	}
	return shorten(text)
}

// urlPattern finds URLs in text.
var urlPattern = regexp.MustCompile(`[a-zA-Z][a-zA-Z0-9+.-]*://[^\s"'<>]+`)

// bareURL is a URL without what may be secret in it.
func bareURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "[URL]"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// shorten makes text of others fit for a message: of bounded length, without what steers a terminal, and with bare URLs.
func shorten(s string) string {
	const limit = 400
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s, "?"))
	s = strings.Join(strings.Fields(urlPattern.ReplaceAllStringFunc(s, bareURL)), " ")
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}

func newScrubber(c authn.AuthConfig) *scrubber {
	s := &scrubber{}
	for _, secret := range []string{c.Password, c.Auth, c.IdentityToken, c.RegistryToken} {
		s.add(secret, url.QueryEscape(secret))
	}
	return s
}
