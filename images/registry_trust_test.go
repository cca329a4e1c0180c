package images

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// farServer is at an address that is nobody's own, as far.example, with a certificate that nobody vouches for, or none. It
// grants a token to whoever shows the test's password, and has besides what the hub has.
func farServer(t *testing.T, of *hub, withTLS bool) *hub {
	t.Helper()
	h := &hub{}
	h.serveFar(t, "far.example", withTLS, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.requests = append(h.requests, r.Method+" "+r.URL.Path+" "+r.Header.Get("Authorization"))
		h.mu.Unlock()
		if r.URL.Path == "/token" {
			if r.Header.Get("Authorization") != basic(testUser, testPassword) {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			send(w, []byte(`{"token":"granted"}`))
			return
		}
		r.Header.Set("X-Far", "yes")
		of.Config.Handler.ServeHTTP(w, r)
	}))
	return h
}

// leadTo makes a hub send whoever asks for a part of it elsewhere, with a token from there or by a redirect.
func leadTo(h *hub, part, url string) {
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.Header.Get("X-Far") != "", part == "token" && r.Header.Get("Authorization") == "Bearer granted":
			return false
		case part == "token":
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+url+`/token",service="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		case strings.Contains(r.URL.Path, part):
			http.Redirect(w, r, url+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
}

// TestInsecureIsForOneHostAlone: a registry on loopback, or one that is configured so, may be reached without a certificate
// or without TLS; where it leads to may not, unless that is configured so itself.
func TestInsecureIsForOneHostAlone(t *testing.T) {
	near := newHub(t)
	near.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	_, port, _ := strings.Cut(near.host, ":")
	for name, withTLS := range map[string]bool{"a certificate that nobody vouches for": true, "plain http": false} {
		far := farServer(t, near, withTLS)
		for _, part := range []string{"token", "/manifests/", "/blobs/"} {
			for _, registry := range []string{near.host, "inside.example:" + port} {
				t.Run(name+" "+part+" "+registry, func(t *testing.T) {
					auth := &Auth{Username: testUser, Password: testPassword}
					leadTo(near, part, far.URL)
					far.intercept(nil)
					registries := map[string]RegistryConfig{"inside.example:" + port: {Insecure: true}}
					s := openStore(t, Config{Registries: registries})
					_, err := s.Pull(context.Background(), registry+"/app:1", auth)
					if err == nil || !withTLS && !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), far.host) || !strings.Contains(err.Error(), "section in registries") {
						t.Errorf("error = %v", err)
					}
					if got := far.seen(""); len(got) > 0 {
						t.Errorf("it was asked %q", got)
					}
					registries[far.host] = RegistryConfig{Insecure: true}
					pulled, err := s.Pull(context.Background(), registry+"/app:1", auth)
					if err != nil || len(pulled.RepoTags) != 1 {
						t.Errorf("with a section: %+v, %v", pulled, err)
					}
				})
			}
		}
	}
}

// TestBlobsMayComeInClear where a registry whose certificate is verified redirects them, without credentials; not to where
// the registry itself may not be. What a mirror leads to is no reason not to ask the registry.
func TestBlobsMayComeInClear(t *testing.T) {
	h, s := farHub(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	far := farServer(t, h, false)
	leadTo(h, "/blobs/", far.URL)
	if _, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword}); err != nil {
		t.Fatal(err)
	}
	if got := far.seen("GET"); len(got) != 2 || len(far.seen("Basic"))+len(far.seen("Bearer")) > 0 {
		t.Errorf("the storage has seen %q", got)
	}

	leadTo(h, "/blobs/", "http://inside.example:80")
	near := newHub(t)
	near.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	s = openStore(t, Config{Registries: map[string]RegistryConfig{h.host: s.cfg.Registries[h.host], near.host: {Mirrors: []string{h.host}}}})
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "section in registries") {
		t.Errorf("error = %v", err)
	}
	leadTo(h, sum(gzipLayer(t, file("a", "x")).blob), "http://inside.example:80")
	pull(t, s, near.host+"/app:1")
	if len(h.seen(sum(gzipLayer(t, file("a", "x")).blob))) == 0 {
		t.Error("the mirror was not asked")
	}
}

// TestThisMachineMayLeadToItself: a registry on loopback has its token server and its storage on other ports there.
func TestThisMachineMayLeadToItself(t *testing.T) {
	h, tokens := newHub(t), newHub(t)
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	tokens.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" && !wantBasic(w, r) {
			send(w, []byte(`{"token":"granted"}`))
		}
		return true
	})
	_, port, _ := strings.Cut(tokens.host, ":")
	leadTo(h, "token", "http://localhost:"+port)
	if _, err := openStore(t, Config{}).Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword}); err != nil {
		t.Error(err)
	}
}

// TestNamesOfThisMachine: what is believed for being on loopback is there, whatever a name server says.
func TestNamesOfThisMachine(t *testing.T) {
	r := newReach("localhost:5000", 0, func(string) bool { return false })
	for resolved, ok := range map[string]bool{"127.0.0.1:5000": true, "[::1]:5000": true, farAddress + ":5000": false} {
		if err := r.check("localhost:5000", resolved); (err == nil) != ok {
			t.Errorf("%s: %v", resolved, err)
		}
	}
}

// TestWhoGetsTheCredentials: the registry, and the token server that it names, over TLS that is verified; not where either
// redirects to, nor where the blobs are.
func TestWhoGetsTheCredentials(t *testing.T) {
	for name, auth := range map[string]*Auth{"password": {Username: testUser, Password: testPassword}, "identity token": {IdentityToken: "identity-secret"}} {
		t.Run(name, func(t *testing.T) {
			h, s := farHub(t, Config{})
			tokens, other := exampleServer(t), exampleServer(t)
			img := imageOf(t, gzipLayer(t, file("a", "x")))
			h.push(t, "app:1", img)
			other.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					send(w, []byte(`{"token":"from another"}`))
					return true
				}
				r.Header.Set("X-Far", "yes")
				h.Config.Handler.ServeHTTP(w, r)
				return true
			})
			grant := func(w http.ResponseWriter, _ *http.Request) { send(w, []byte(`{"token":"granted"}`)) }
			tokens.intercept(func(w http.ResponseWriter, r *http.Request) bool { grant(w, r); return true })
			h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case r.Header.Get("X-Far") != "":
					return false
				case r.Header.Get("Authorization") != "Bearer granted":
					w.Header().Set("WWW-Authenticate", `Bearer realm="https://`+tokens.host+`/token",service="test"`)
					w.WriteHeader(http.StatusUnauthorized)
				case strings.Contains(r.URL.Path, "/blobs/"):
					http.Redirect(w, r, "https://"+other.host+r.URL.Path, http.StatusTemporaryRedirect)
				default:
					return false
				}
				return true
			})
			if _, err := s.Pull(context.Background(), h.host+"/app:1", auth); err != nil {
				t.Fatal(err)
			}
			if got := len(tokens.seen(basic(testUser, testPassword))) + len(tokens.seen("identity-secret")); got == 0 {
				t.Errorf("the token server has seen %q", tokens.seen(""))
			}
			if got := append(h.seen("Basic"), h.seen("identity-secret")...); len(got) > 0 {
				t.Errorf("the registry, which wants a token, has seen %q", got)
			}
			if got := append(other.seen("Basic"), other.seen("granted")...); len(got) > 0 || len(other.seen("/blobs/")) == 0 {
				t.Errorf("the storage has seen %q", other.seen(""))
			}

			grant = func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://"+other.host+"/token", http.StatusTemporaryRedirect)
			}
			if _, err := s.Pull(context.Background(), h.host+"/app:1", auth); err == nil {
				t.Error("a token of another server serves")
			} else if auth.IdentityToken != "" && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), other.host)) {
				t.Errorf("error = %v", err)
			}
			if got := append(other.seen("Basic"), other.seen("identity-secret")...); len(got) > 0 {
				t.Errorf("where the token server redirects to: %q", got)
			}
		})
	}
}

// exampleServer is at the address and with the certificate of a farHub, and notes bodies too.
func exampleServer(t *testing.T) *hub {
	t.Helper()
	h := &hub{}
	inner := h.handler()
	h.serveFar(t, "example.com", true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body := r.FormValue("refresh_token"); body != "" {
			h.mu.Lock()
			h.requests = append(h.requests, r.URL.Path+" "+body)
			h.mu.Unlock()
		}
		inner.ServeHTTP(w, r)
	}))
	return h
}

// TestTheLibrarysOwnRefusals: where the library does not follow, it says so without a type. What a registry writes into the
// body of an error is no such word.
func TestTheLibrarysOwnRefusals(t *testing.T) {
	for _, said := range []string{"refusing token-server redirect from https to http", "invalid realm"} {
		if err := classify(&url.Error{Op: "Get", URL: "https://example.com/token", Err: errors.New(said)}); !errors.Is(err, errMisled) {
			t.Errorf("%s: %v", said, err)
		}
		answer := &transport.Error{StatusCode: http.StatusServiceUnavailable, Errors: []transport.Diagnostic{{Message: said}}}
		if err := classify(answer); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s, by the registry: %v", said, err)
		}
	}
}
