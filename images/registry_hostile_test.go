package images

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// farHub is a registry at an address that is nobody's own, reached by TLS as example.com; the store trusts it.
func farHub(t *testing.T, cfg Config) (*hub, *Store) {
	t.Helper()
	h := &hub{}
	h.serveFar(t, "example.com", true, h.handler())
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	if cfg.Registries == nil {
		cfg.Registries = map[string]RegistryConfig{}
	}
	cfg.Registries[h.host] = RegistryConfig{CAFile: ca}
	return h, openStore(t, cfg)
}

// serveFar serves a hub at an address that is nobody's own, by a name that leads there.
func (h *hub) serveFar(t *testing.T, name string, withTLS bool, handler http.Handler) {
	t.Helper()
	h.Server = httptest.NewUnstartedServer(handler)
	h.Listener.Close()
	var err error
	if h.Listener, err = net.Listen("tcp", farAddress+":0"); err != nil {
		t.Fatal(err)
	}
	h.Config.ErrorLog = discardLog
	scheme := "http://"
	if withTLS {
		h.StartTLS()
		scheme = "https://"
	} else {
		h.Start()
	}
	t.Cleanup(h.Close)
	_, port, err := net.SplitHostPort(h.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h.host = name + ":" + port
	h.URL = scheme + h.host
}

// trap is a server that nobody may connect to; where it is reached at another address, give that.
func trap(t *testing.T, at string) (port string) {
	t.Helper()
	return serveConns(t, at, func(net.Conn) { t.Error("somebody connected to where the registry must not lead") })
}

// serveConns hands every connection to an address to serve, one after another, until the test ends.
func serveConns(t *testing.T, at string, serve func(net.Conn)) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", at+":0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// TestARegistryLeadsNowhereNear: by a redirect of any request or by its token server, to an address that is nearer than
// its own, by number or by name, or to another scheme.
func TestARegistryLeadsNowhereNear(t *testing.T) {
	port := trap(t, "127.0.0.1")
	far := trap(t, farAddress)
	for name, target := range map[string]string{
		"loopback by name": "https://inside.example:" + port, "loopback by number": "https://127.0.0.1:" + port,
		"the lan by name": "https://lan.example:" + port, "link-local by name": "https://link.example:" + port, "link-local by number": "https://169.254.169.254",
		"plain http": "http://far.example:" + far, "another scheme": "ftp://far.example:" + far, "a file": "file:///etc/passwd",
	} {
		for _, what := range []string{"/v2/", "/manifests/", "/blobs/", "token"} {
			if name == "plain http" && what == "/blobs/" {
				continue // see TestBlobsMayComeInClear
			}
			t.Run(name+" "+what, func(t *testing.T) {
				h, s := farHub(t, Config{})
				h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
				h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
					switch {
					case what == "token":
						w.Header().Set("WWW-Authenticate", `Bearer realm="`+target+`/token",service="test"`)
						w.WriteHeader(http.StatusUnauthorized)
					case what == "/v2/" && r.URL.Path != "/v2/", !strings.Contains(r.URL.Path, what):
						return false
					default:
						http.Redirect(w, r, target+"/elsewhere?signature=signed-secret", http.StatusTemporaryRedirect)
					}
					return true
				})
				_, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
				// RegistryUnavailable would have the kubelet ask for ever.
				if refused := strings.HasPrefix(target, "http"); err == nil || refused && (!errors.Is(err, ErrRefused) || errors.Is(err, ErrUnavailable)) ||
					strings.Contains(err.Error(), "signed-secret") || strings.Contains(err.Error(), testPassword) {
					t.Errorf("error = %v", err)
				}
				expectEmpty(t, s)
			})
		}
	}
}

func TestAHostWithASectionMayBeNear(t *testing.T) {
	storage, plain := newTLSHub(t), imageOf(t, gzipLayer(t, file("a", "x")))
	_, port, _ := strings.Cut(storage.host, ":")
	inside := "inside.example:" + port
	h, s := farHub(t, Config{})
	for _, hub := range []*hub{h, storage} {
		hub.push(t, "app:1", plain)
	}
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, "https://"+inside+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "section in registries") {
		t.Errorf("without a section: %v", err)
	}
	s.cfg.Registries[inside] = RegistryConfig{}
	// It is reached, and its certificate looked at, which is for another name.
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("with a section: %v", err)
	}
}

func TestNearness(t *testing.T) {
	for address, want := range map[string]nearness{"127.0.0.1": onMachine, "::1": onMachine, "0.0.0.0": onMachine, "::": onMachine, "::ffff:127.0.0.1": onMachine,
		"169.254.169.254": onLink, "fe80::1": onLink, "10.0.0.1": inNetwork, "192.168.1.1": inNetwork, "172.16.0.1": inNetwork, "fd00:ec2::254": inNetwork,
		"100.64.0.1": inNetwork, "1.1.1.1": farAway, "2606:4700::1": farAway} {
		if got := nearnessOf(netip.MustParseAddr(address)); got != want {
			t.Errorf("%s: %d, want %d", address, got, want)
		}
	}
}

// trickle sends the body by single bytes, far from fast enough, and for ever where there is none.
func trickle(w http.ResponseWriter, r *http.Request, status int, body []byte) {
	w.WriteHeader(status)
	for i := 0; r.Context().Err() == nil && (body == nil || i < len(body)); i++ {
		b := byte(' ')
		if body != nil {
			b = body[i]
		}
		send(w, []byte{b})
		w.(http.Flusher).Flush()
		time.Sleep(20 * time.Millisecond)
	}
}

// flood sends for ever, as fast as it is taken.
func flood(w http.ResponseWriter, r *http.Request, status int) {
	w.WriteHeader(status)
	for chunk := bytes.Repeat([]byte{'x'}, 64<<10); r.Context().Err() == nil; {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// TestServersThatHoldOn: whatever part of an answer comes too slowly, never ends or is too large, the pull ends by itself.
func TestServersThatHoldOn(t *testing.T) {
	answers := map[string]func(w http.ResponseWriter, r *http.Request){
		"trickle":       func(w http.ResponseWriter, r *http.Request) { trickle(w, r, http.StatusOK, nil) },
		"trickle error": func(w http.ResponseWriter, r *http.Request) { trickle(w, r, http.StatusNotFound, nil) },
		"flood":         func(w http.ResponseWriter, r *http.Request) { flood(w, r, http.StatusOK) },
		"flood error":   func(w http.ResponseWriter, r *http.Request) { flood(w, r, http.StatusNotFound) },
		"no header": func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-time.After(time.Second): // the client may be gone without this side's notice
			}
			panic(http.ErrAbortHandler)
		},
		"huge header": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Huge", strings.Repeat("h", 2<<20))
			w.WriteHeader(http.StatusOK)
		},
		"too long": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10000000")
			send(w, []byte("{}"))
		},
	}
	for name, answer := range answers {
		for _, part := range []string{"/token", "/manifests/", "/blobs/"} {
			t.Run(name+" "+part, func(t *testing.T) {
				t.Parallel()
				h, s := tokenHub(t), openStore(t, Config{})
				s.fetch.transports.waits.header = 300 * time.Millisecond
				inner := h.hook
				h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
					if strings.Contains(r.URL.Path, part) && (part == "/token" || r.Header.Get("Authorization") == "Bearer granted") {
						answer(w, r)
						return true
					}
					return inner(w, r)
				})
				_, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
				known := false
				for _, class := range []error{ErrUnavailable, ErrNotFound, ErrRefused, ErrDigest} {
					known = known || errors.Is(err, class)
				}
				if !known {
					t.Errorf("error = %v", err)
				}
				expectEmpty(t, s)
			})
		}
	}
}

// TestAHandshakeIsNotReadForEver: the answer to /v2/ is read to its end by the library.
func TestAHandshakeIsNotReadForEver(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"trickle": func(w http.ResponseWriter, r *http.Request) { trickle(w, r, http.StatusOK, nil) },
		"flood":   func(w http.ResponseWriter, r *http.Request) { flood(w, r, http.StatusOK) },
	} {
		t.Run(name, func(t *testing.T) {
			h, s := newHub(t), openStore(t, Config{})
			h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
			h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/v2/" {
					return false
				}
				answer(w, r)
				return true
			})
			pull(t, s, h.host+"/app:1")
		})
	}
}

func TestWrongLengths(t *testing.T) {
	l := layerOf(t, "", file("f", strings.Repeat("z", 50_000)))
	for name, serve := range map[string]func(w http.ResponseWriter){
		"longer than said": func(w http.ResponseWriter) { send(w, append(bytes.Clone(l.blob), 'x')) },
		"endless":          func(w http.ResponseWriter) { flood(w, httptest.NewRequest(http.MethodGet, "/", nil), http.StatusOK) },
		"shorter":          func(w http.ResponseWriter) { send(w, l.blob[:1000]) },
		"chunked, shorter": func(w http.ResponseWriter) { w.(http.Flusher).Flush(); send(w, l.blob[:1000]) },
		"empty":            func(w http.ResponseWriter) { w.WriteHeader(http.StatusOK) },
	} {
		t.Run(name, func(t *testing.T) {
			h, s := newHub(t), openStore(t, Config{})
			h.push(t, "app:1", imageOf(t, l))
			h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, sum(l.blob)) {
					return false
				}
				serve(w)
				return true
			})
			_, err := s.Pull(context.Background(), h.host+"/app:1", nil)
			if !errors.Is(err, ErrDigest) && !errors.Is(err, ErrUnavailable) {
				t.Errorf("error = %v", err)
			}
			expectEmpty(t, s)
		})
	}
}

// TestTokensThatExpire: each token serves for three requests, of which a pull of eight layers needs more.
func TestTokensThatExpire(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	var layers []*testLayer
	for i := range 8 {
		layers = append(layers, gzipLayer(t, file(fmt.Sprint("f", i), "x")))
	}
	h.push(t, "app:1", imageOf(t, layers...))
	var issued, refuse atomic.Int32
	var left [100]atomic.Int32
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			if refuse.Load() > 0 && issued.Load() >= refuse.Load() {
				w.WriteHeader(http.StatusForbidden)
				return true
			}
			n := issued.Add(1)
			left[n].Store(3)
			send(w, fmt.Appendf(nil, `{"token":"token-%d"}`, n))
			return true
		}
		var n int
		if _, err := fmt.Sscanf(r.Header.Get("Authorization"), "Bearer token-%d", &n); err == nil && left[n].Add(-1) >= 0 {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+h.URL+`/token",service="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	pull(t, s, h.host+"/app:1")
	if n := issued.Load(); n < 3 {
		t.Errorf("%d tokens", n)
	}
	issued.Store(0)
	refuse.Store(2)
	s2 := openStore(t, Config{})
	if _, err := s2.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrDenied) {
		t.Errorf("where no more tokens are given: %v", err)
	}
	expectEmpty(t, s2)
}

// TestChallengesThatLoop: a registry that never has enough is not asked for ever.
func TestChallengesThatLoop(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	n := atomic.Int32{}
	for name, challenge := range map[string]string{"bearer": `Bearer realm="` + h.URL + `/token",scope="repository:app:%d"`, "basic": `Basic realm="%d"`, "noise": "Quux %d"} {
		h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				send(w, []byte(`{"token":"never enough"}`))
				return true
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(challenge, n.Add(1)))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		_, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
		if !errors.Is(err, ErrDenied) && !errors.Is(err, ErrUnavailable) || len(h.seen("/")) > 20 {
			t.Errorf("%s: %v after %d requests", name, err, len(h.seen("/")))
		}
	}
}

func TestBrokenTLS(t *testing.T) {
	for name, serve := range map[string]func(c net.Conn){
		"closes":  func(net.Conn) {},
		"noise":   func(c net.Conn) { send(c, bytes.Repeat([]byte("noise"), 1000)) },
		"plain":   func(c net.Conn) { send(c, []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) },
		"silence": func(c net.Conn) { send(c, nil); _, _ = c.Read(make([]byte, 1<<16)); _, _ = c.Read(make([]byte, 1)) },
	} {
		t.Run(name, func(t *testing.T) {
			port := serveConns(t, farAddress, serve)
			s := openStore(t, Config{})
			s.fetch.transports.waits.dial = 500 * time.Millisecond
			if _, err := s.Pull(context.Background(), "far.example:"+port+"/app:1", &Auth{Username: testUser, Password: testPassword}); !errors.Is(err, ErrUnavailable) {
				t.Errorf("error = %v", err)
			}
		})
	}
}

// TestNoMessageQuotesASecret: a registry that sends back what it was shown, in every place that a message may be made of.
func TestNoMessageQuotesASecret(t *testing.T) {
	secrets := []string{testPassword, strings.TrimPrefix(basic(testUser, testPassword), "Basic "), "bearer-token", "query-token", "user-info"}
	echo := func(w http.ResponseWriter, status int, r *http.Request) {
		w.WriteHeader(status)
		send(w, fmt.Appendf(nil, `{"errors":[{"code":"DENIED","message":"\u001b[31mno: %s, see https://x:user-info@example.com/?t=query-token"}]}`, r.Header.Get("Authorization")))
	}
	for name, fail := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"token": func(w http.ResponseWriter, r *http.Request) bool { return r.URL.Path == "/token" && done(echo, w, r) },
		"manifest": func(w http.ResponseWriter, r *http.Request) bool {
			return strings.Contains(r.URL.Path, "/manifests/") && done(echo, w, r)
		},
		"blob": func(w http.ResponseWriter, r *http.Request) bool {
			return strings.Contains(r.URL.Path, "/blobs/") && done(echo, w, r)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			http.Redirect(w, r, "http://x:user-info@169.254.1.1:1/?t=query-token", http.StatusFound)
			return true
		},
		"token redirect": func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				http.Redirect(w, r, "ftp://x:user-info@far.example/?t=query-token", http.StatusFound)
			}
			return r.URL.Path == "/token"
		},
	} {
		t.Run(name, func(t *testing.T) {
			var logged bytes.Buffer
			h, s := newHub(t), openStore(t, Config{Log: textLog(&logged)})
			h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
			h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/token" && r.Header.Get("Authorization") != "Bearer bearer-token" {
					w.Header().Set("WWW-Authenticate", `Bearer realm="`+h.URL+`/token?t=query-token",service="test"`)
					w.WriteHeader(http.StatusUnauthorized)
					return true
				}
				if fail(w, r) {
					return true
				}
				if r.URL.Path == "/token" {
					send(w, []byte(`{"token":"bearer-token"}`))
				}
				return r.URL.Path == "/token"
			})
			_, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
			if err == nil {
				t.Fatal("no error")
			}
			for _, secret := range append(secrets, "\x1b") {
				if strings.Contains(err.Error(), secret) || strings.Contains(logged.String(), secret) {
					t.Errorf("%q is in the error or in the log: %v\n%s", secret, err, logged.String())
				}
			}
		})
	}
	for _, ref := range []string{"https://x:user-info@example.com/app:1?t=query-token"} {
		if _, err := parseReference(ref); err == nil || strings.Contains(err.Error(), "user-info") || strings.Contains(err.Error(), "query-token") {
			t.Errorf("%v", err)
		}
	}
	if _, err := parseMirror("https://x:user-info@example.com"); err == nil || strings.Contains(err.Error(), "user-info") {
		t.Errorf("%v", err)
	}
}

func done(answer func(http.ResponseWriter, int, *http.Request), w http.ResponseWriter, r *http.Request) bool {
	answer(w, http.StatusForbidden, r)
	return true
}

// TestCancelAtEveryStep: a pull whose caller goes ends, and leaves nothing, wherever the registry has it waiting.
func TestCancelAtEveryStep(t *testing.T) {
	hang := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	begun := func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		send(w, bytes.Repeat([]byte(" "), 10_000))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	busy := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "2")
		w.WriteHeader(http.StatusTooManyRequests)
	}
	for _, part := range []string{"/v2/", "/token", "/manifests/", "/blobs/"} {
		for name, answer := range map[string]func(http.ResponseWriter, *http.Request){"no answer": hang, "half an answer": begun, "asks to wait": busy} {
			t.Run(part+" "+name, func(t *testing.T) {
				h, s := tokenHub(t), openStore(t, Config{})
				s.cfg.waits.stall, s.cfg.waits.retryAfter = time.Hour, time.Hour
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				inner := h.hook
				h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
					there := strings.Contains(r.URL.Path, part)
					if part == "/v2/" {
						there = r.URL.Path == part
					}
					if !there || part != "/token" && part != "/v2/" && r.Header.Get("Authorization") == "" {
						return inner(w, r)
					}
					time.AfterFunc(20*time.Millisecond, cancel)
					answer(w, r)
					return true
				})
				if _, err := s.Pull(ctx, h.host+"/app:1", &Auth{Username: testUser, Password: testPassword}); !errors.Is(err, context.Canceled) {
					t.Errorf("error = %v", err)
				}
				expectEmpty(t, s)
			})
		}
	}
}

// TestCancelInTheMiddleOfABomb: no byte more of the network is needed, and unpacking would go on for long.
func TestCancelInTheMiddleOfABomb(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, compressLayer(t, "", sparseArchive(60<<30))))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for !s.fetch.slots.busy() && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond)
		cancel()
	}()
	if _, err := s.Pull(ctx, h.host+"/app:1", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	expectEmpty(t, s)
}

func TestRetryAfter(t *testing.T) {
	for value, want := range map[string]time.Duration{"7": 7 * time.Second, "-1": 0, "x": 0, "": 0, "99999999999": 0,
		time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat): 0} {
		if got := retryAfter(http.Header{"Retry-After": {value}}); got != want && !(value == "99999999999" && got >= 0) {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
	at := time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)
	if got := retryAfter(http.Header{"Retry-After": {at}}); got < 55*time.Minute || got > time.Hour {
		t.Errorf("%s: %v", at, got)
	}
	// A date is waited for, and the pull goes on.
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	var asked, until atomic.Int64
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		if asked.Add(1) == 1 {
			at := time.Now().Add(1500 * time.Millisecond)
			until.Store(at.Truncate(time.Second).UnixNano())
			w.Header().Set("Retry-After", at.UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		if time.Now().UnixNano() < until.Load() {
			t.Error("it came before the time that it was asked to wait for")
		}
		return false
	})
	pull(t, s, h.host+"/app:1")
	if asked.Load() != 2 {
		t.Errorf("asked %d times", asked.Load())
	}
	// A refusal that lasts has the code that the kubelet acts on.
	h.intercept(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	refusedPull(t, openStore(t, Config{}), h.host+"/app:2", codes.Unavailable, "RegistryUnavailable", "503")
}
