package images

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func textLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

const (
	testUser     = "alice"
	testPassword = "s3cr3t-pa$$ word"
)

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// wantBasic refuses whoever does not show the test's user and password.
func wantBasic(w http.ResponseWriter, r *http.Request) bool {
	if r.Header.Get("Authorization") == basic(testUser, testPassword) {
		return false
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
	return true
}

func TestCredentials(t *testing.T) {
	h := newHub(t)
	id := h.push(t, "private/app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	h.intercept(wantBasic)
	ref := h.host + "/private/app:1"
	encoded := base64.StdEncoding.EncodeToString([]byte(testUser + ":" + testPassword))
	good := &Auth{Username: testUser, Password: testPassword}

	write := func(content string) string {
		path := filepath.Join(t.TempDir(), "config.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	helperDir := t.TempDir()
	script := "#!/bin/sh\nread server\ncase $server in\n" + h.host + `) printf '{"Username":"%s","Secret":"%s"}' 'alice' 's3cr3t-pa$$ word';;` +
		"\n*) echo credentials not found in native keychain; exit 1;;\nesac\n"
	if err := os.WriteFile(filepath.Join(helperDir, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", helperDir+":"+os.Getenv("PATH"))

	for name, c := range map[string]struct {
		cfg  Config
		auth *Auth
		ok   bool
	}{
		"none":                      {},
		"user and password":         {auth: good, ok: true},
		"auth":                      {auth: &Auth{Auth: encoded}, ok: true},
		"auth without padding":      {auth: &Auth{Auth: strings.TrimRight(encoded, "=")}, ok: true},
		"for this server":           {auth: &Auth{Username: testUser, Password: testPassword, ServerAddress: "http://" + h.host + "/v1/"}, ok: true},
		"for another server":        {auth: &Auth{Username: testUser, Password: testPassword, ServerAddress: "https://index.docker.io/v1/"}},
		"wrong password":            {auth: &Auth{Username: testUser, Password: "wrong-" + testPassword}},
		"registries section":        {cfg: Config{Registries: map[string]RegistryConfig{h.host: {Username: testUser, Password: testPassword}}}, ok: true},
		"request before section":    {cfg: Config{Registries: map[string]RegistryConfig{h.host: {Username: "x", Password: "y"}}}, auth: good, ok: true},
		"section before file":       {cfg: Config{Registries: map[string]RegistryConfig{h.host: {Username: testUser, Password: testPassword}}, DockerConfig: write(`{"auths":{"` + h.host + `":{"auth":"eDp5"}}}`)}, ok: true},
		"docker config":             {cfg: Config{DockerConfig: write(`{"auths":{"` + h.host + `":{"auth":"` + encoded + `"}}}`)}, ok: true},
		"docker config with scheme": {cfg: Config{DockerConfig: write(`{"auths":{"https://` + h.host + `/v2/":{"auth":"` + encoded + `"}}}`)}, ok: true},
		"auth.json by path":         {cfg: Config{DockerConfig: write(`{"auths":{"` + h.host + `":{"auth":"eDp5"},"` + h.host + `/private":{"auth":"` + encoded + `"}}}`)}, ok: true},
		"another's path":            {cfg: Config{DockerConfig: write(`{"auths":{"` + h.host + `/priv":{"auth":"` + encoded + `"}}}`)}},
		"credsStore":                {cfg: Config{DockerConfig: write(`{"auths":{"` + h.host + `":{}},"credsStore":"test"}`)}, ok: true},
		"credHelpers":               {cfg: Config{DockerConfig: write(`{"credHelpers":{"` + h.host + `":"test"}}`)}, ok: true},
		"helper is missing":         {cfg: Config{DockerConfig: write(`{"credsStore":"desktop-not-installed"}`)}},
		"file is torn":              {cfg: Config{DockerConfig: write(`{"auths":{"` + testPassword)}},
	} {
		t.Run(name, func(t *testing.T) {
			var logged bytes.Buffer
			c.cfg.Log = textLog(&logged)
			s := openStore(t, c.cfg)
			img, err := s.Pull(context.Background(), ref, c.auth)
			if c.ok && (err != nil || img.ID != id) {
				t.Errorf("%+v, %v", img, err)
			}
			if !c.ok && !errors.Is(err, ErrDenied) {
				t.Errorf("error = %v", err)
			}
			if name == "helper is missing" && (err == nil || !strings.Contains(err.Error(), "docker-credential-desktop-not-installed")) {
				t.Errorf("the error does not say that the helper is missing: %v", err)
			}
			printed, jsonErr := json.Marshal(c.cfg.Registries)
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			all := logged.String() + fmt.Sprint(err) + fmt.Sprint(c.cfg.Registries) + string(printed)
			for _, secret := range []string{testPassword, encoded} {
				if strings.Contains(all, secret) {
					t.Errorf("%q appears in log or error:\n%s", secret, all)
				}
			}
		})
	}
	if _, err := openStore(t, Config{}).Pull(context.Background(), ref, &Auth{Auth: "%%%"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("auth that is not base64: %v", err)
	}
}

func TestUserFilesAreFound(t *testing.T) {
	h := newHub(t)
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	h.intercept(wantBasic)
	encoded := base64.StdEncoding.EncodeToString([]byte(testUser + ":" + testPassword))
	for name, file := range map[string]string{
		"docker": "home/.docker/config.json", "DOCKER_CONFIG": "dc/config.json", "REGISTRY_AUTH_FILE": "authfile",
		"runtime": "run/containers/auth.json", "config": "home/.config/containers/auth.json",
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			t.Setenv("HOME", base+"/home")
			t.Setenv("XDG_RUNTIME_DIR", base+"/run")
			t.Setenv("XDG_CONFIG_HOME", "")
			t.Setenv("REGISTRY_AUTH_FILE", base+"/authfile")
			t.Setenv("DOCKER_CONFIG", "")
			if name == "DOCKER_CONFIG" {
				t.Setenv("DOCKER_CONFIG", base+"/dc")
			}
			s := openStore(t, Config{})
			s.cfg.DockerConfig = ""
			if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrDenied) {
				t.Errorf("before the login: %v", err)
			}
			path := filepath.Join(base, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(`{"auths":{"`+h.host+`":{"auth":"`+encoded+`"}}}`), 0o600); err != nil {
				t.Fatal(err)
			}
			pull(t, s, h.host+"/app:1") // a login counts at once
		})
	}
}

// tokenHub wants a bearer token, which its own /token gives to whoever shows credentials.
func tokenHub(t *testing.T) *hub {
	h := newHub(t)
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			grant := func() { send(w, []byte(`{"token":"granted"}`)) }
			switch {
			case r.Method == http.MethodPost && r.FormValue("refresh_token") == "identity-secret" && r.FormValue("scope") == "repository:app:pull":
				grant()
			case r.Header.Get("Authorization") == basic(testUser, testPassword):
				grant()
			default:
				http.Error(w, "who are you? "+r.Header.Get("Authorization")+r.FormValue("refresh_token"), http.StatusUnauthorized)
			}
			return true
		}
		if a := r.Header.Get("Authorization"); a == "Bearer granted" || a == "Bearer registry-secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+h.URL+`/token",service="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	return h
}

func TestTokens(t *testing.T) {
	h := tokenHub(t)
	for name, c := range map[string]struct {
		auth *Auth
		ok   bool
	}{
		"password":       {&Auth{Username: testUser, Password: testPassword}, true},
		"identity token": {&Auth{IdentityToken: "identity-secret"}, true},
		"registry token": {&Auth{RegistryToken: "registry-secret"}, true},
		"wrong identity": {&Auth{IdentityToken: "identity-wrong"}, false},
		"wrong password": {&Auth{Username: testUser, Password: "wrong-secret"}, false},
		"wrong registry": {&Auth{RegistryToken: "registry-wrong"}, false},
		"none":           {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, Config{})
			_, err := s.Pull(context.Background(), h.host+"/app:1", c.auth)
			if c.ok && err != nil || !c.ok && !errors.Is(err, ErrDenied) {
				t.Errorf("error = %v", err)
			}
			if err != nil && (strings.Contains(err.Error(), "wrong") || strings.Contains(err.Error(), "Basic")) {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	h := newTLSHub(t)
	id := h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw}
	if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o644); err != nil {
		t.Fatal(err)
	}
	// The test's certificate is for example.com, too: a name that is not loopback must be verified.
	_, port, _ := strings.Cut(h.host, ":")
	dial := func(s *Store, at endpoint) {
		tr, err := s.fetch.transports.get(at)
		if err != nil {
			t.Fatal(err)
		}
		tr.DialContext = redial(h.host)
	}
	ref := "example.com:" + port + "/app:1"
	for name, c := range map[string]struct {
		rc RegistryConfig
		ok bool
	}{"not trusted": {}, "caFile": {RegistryConfig{CAFile: ca}, true}, "insecure": {RegistryConfig{Insecure: true}, true}} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, Config{Registries: map[string]RegistryConfig{"example.com:" + port: c.rc}})
			dial(s, endpoint{host: "example.com:" + port, insecure: c.rc.Insecure, caFile: c.rc.CAFile})
			img, err := s.Pull(context.Background(), ref, &Auth{Username: testUser, Password: testPassword})
			if c.ok && (err != nil || img.ID != id) {
				t.Errorf("%v", err)
			}
			if !c.ok && (!errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "certificate")) {
				t.Errorf("error = %v", err)
			}
		})
	}
	if _, err := openStore(t, Config{Registries: map[string]RegistryConfig{h.host: {CAFile: "/nonexistent"}}}).Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("missing caFile: %v", err)
	}
}

func TestPlainHTTPNeedsLeave(t *testing.T) {
	h := newHub(t)
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	h.intercept(nil)
	_, port, _ := strings.Cut(h.host, ":")
	for _, host := range []string{"registry.example:" + port, "10.1.2.3:" + port} {
		for _, insecure := range []bool{false, true} {
			s := openStore(t, Config{Registries: map[string]RegistryConfig{host: {Insecure: insecure}}})
			tr, err := s.fetch.transports.get(endpoint{host: host, insecure: insecure})
			if err != nil {
				t.Fatal(err)
			}
			tr.DialContext = redial(h.host)
			_, err = s.Pull(context.Background(), host+"/app:1", &Auth{Username: testUser, Password: testPassword})
			if insecure != (err == nil) {
				t.Errorf("%s, insecure %v: %v", host, insecure, err)
			}
			if !insecure && len(h.seen("Basic")) > 0 {
				t.Errorf("%s: credentials went over plain http", host)
			}
			h.intercept(nil)
		}
	}
}

func TestMirrors(t *testing.T) {
	origin, first, second := newHub(t), newHub(t), newHub(t)
	img := imageOf(t, gzipLayer(t, file("a", "x")))
	id := second.push(t, "cache/team/app:1", img)
	dead := "127.0.0.1:1"
	s := openStore(t, Config{Registries: map[string]RegistryConfig{
		origin.host: {Mirrors: []string{dead, "http://" + first.host, second.host + "/cache"}},
		second.host: {Username: "mirror-user", Password: "mirror-password"},
	}})
	for _, h := range []*hub{origin, first, second} {
		h.intercept(wantBasicOf(h == second))
	}
	ref := origin.host + "/team/app:1"
	got, err := s.Pull(context.Background(), ref, &Auth{Username: testUser, Password: testPassword})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != id || !slices.Equal(got.RepoTags, []string{ref}) || !slices.Equal(got.RepoDigests, []string{origin.host + "/team/app@" + digestOfImage(t, img)}) {
		t.Errorf("%+v", got)
	}
	if len(first.seen("/team/app/manifests/1")) == 0 || len(origin.seen("/")) != 0 {
		t.Errorf("asked the first mirror %v, the registry %v", first.seen("/"), origin.seen("/"))
	}
	for _, h := range []*hub{first, second} {
		if leaked := h.seen(basic(testUser, testPassword)); len(leaked) > 0 {
			t.Errorf("the registry's credentials went to a mirror: %v", leaked)
		}
	}

	// No mirror has it: the registry does, and a blob that a mirror spoils comes from there, too.
	origin.intercept(nil)
	id2 := origin.push(t, "app:2", imageOf(t, gzipLayer(t, file("b", "y"))))
	if got := pull(t, s, origin.host+"/app:2"); got.ID != id2 {
		t.Errorf("%+v", got)
	}
	spoiled := imageOf(t, gzipLayer(t, file("c", "z")))
	origin.push(t, "app:3", spoiled)
	first.intercept(nil)
	first.push(t, "app:3", spoiled)
	first.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") && !strings.HasSuffix(r.URL.Path, mustConfig(t, spoiled)) {
			send(w, []byte("this is something else"))
			return true
		}
		return false
	})
	pull(t, s, origin.host+"/app:3")

	_, err = s.Pull(context.Background(), origin.host+"/nowhere:1", nil)
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "mirror "+first.host) {
		t.Errorf("nobody has it: %v", err)
	}
	if _, err := Open(Config{Root: t.TempDir(), Registries: map[string]RegistryConfig{"x.y": {Mirrors: []string{"ftp://z"}}}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("bad mirror: %v", err)
	}
}

// TestMirrorOfEveryRegistry: the mirrors of "*" answer for whatever has no section, are told which registry is meant,
// and get nobody's credentials.
func TestMirrorOfEveryRegistry(t *testing.T) {
	mirror, plain := newHub(t), newHub(t)
	login := filepath.Join(t.TempDir(), "config.json")
	encoded := base64.StdEncoding.EncodeToString([]byte(testUser + ":" + testPassword))
	if err := os.WriteFile(login, []byte(`{"auths":{"registry.invalid":{"auth":"`+encoded+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, Config{DockerConfig: login, Registries: map[string]RegistryConfig{
		"*": {Mirrors: []string{mirror.host + "/all"}}, plain.host: {}, "known.invalid": {Username: testUser, Password: testPassword},
	}})
	ids := map[string]string{}
	for _, registry := range []string{"docker.io", "registry.invalid"} {
		ids[registry] = mirror.push(t, "all/"+map[string]string{"docker.io": "library/"}[registry]+"app:1", imageOf(t, gzipLayer(t, file("a", registry))))
	}
	// It asks for a password in the handshake, then checks the namespace that a request must have by its path.
	mirror.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/v2/" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		want := "registry.invalid"
		if strings.HasPrefix(r.URL.Path, "/v2/all/library/") {
			want = "docker.io"
		}
		if r.URL.Query().Get("ns") != want {
			t.Errorf("%s has the namespace %q, want %q", r.URL, r.URL.Query().Get("ns"), want)
		}
		return false
	})
	for ref, registry := range map[string]string{"app:1": "docker.io", "registry.invalid/app:1": "registry.invalid"} {
		got, err := s.Pull(context.Background(), ref, &Auth{Username: testUser, Password: testPassword})
		if err != nil {
			t.Fatal(err)
		}
		if got.ID != ids[registry] || len(got.RepoTags) != 1 || !strings.HasPrefix(got.RepoTags[0], registry+"/") {
			t.Errorf("%s: %+v", ref, got)
		}
	}
	if leaked := mirror.seen("Basic"); len(leaked) > 0 {
		t.Errorf("credentials went to the mirror: %v", leaked)
	}
	// A section of its own, even an empty one, is a registry's whole configuration.
	id := plain.push(t, "app:1", imageOf(t, gzipLayer(t, file("b", "y"))))
	mirror.intercept(nil)
	if got := pull(t, s, plain.host+"/app:1"); got.ID != id || len(mirror.seen("/")) != 0 {
		t.Errorf("%+v; the mirror was asked %v", got, mirror.seen("/"))
	}
	for _, rc := range []RegistryConfig{{Insecure: true}, {CAFile: "/ca.pem"}, {Username: "u", Password: "p"}} {
		if _, err := Open(Config{Root: t.TempDir(), Registries: map[string]RegistryConfig{"*": rc}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v for every registry: %v", rc, err)
		}
	}
}

func wantBasicOf(mirror bool) func(http.ResponseWriter, *http.Request) bool {
	if !mirror {
		return nil
	}
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == basic("mirror-user", "mirror-password") {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="mirror"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

func TestRedirectsDoNotCarryCredentials(t *testing.T) {
	h := newHub(t)
	img := imageOf(t, gzipLayer(t, file("a", strings.Repeat("x", 1000))))
	h.push(t, "app:1", img)
	var storage atomic.Value
	bucket := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		storage.Store(r.Header.Get("Authorization") + r.Header.Get("Cookie"))
		http.Redirect(w, r, h.URL+"/stored"+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer bucket.Close()
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/stored/") {
			r.URL.Path = strings.TrimPrefix(r.URL.Path, "/stored")
			return false
		}
		if wantBasic(w, r) {
			return true
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, bucket.URL+r.URL.Path+"?X-Amz-Signature=signed", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	s := openStore(t, Config{})
	if _, err := s.Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword}); err != nil {
		t.Fatal(err)
	}
	if got := storage.Load(); got != "" {
		t.Errorf("storage on another port of the same host saw %q", got)
	}
	bucket.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	_, err := openStore(t, Config{}).Pull(context.Background(), h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
	if !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "signed") {
		t.Errorf("error = %v", err)
	}
	via := []*http.Request{{URL: &url.URL{Scheme: "https", Host: "registry.example"}}}
	for _, inside := range []string{"169.254.169.254", "127.0.0.1:80", "10.0.0.1", "[::1]:1", "localhost"} {
		if err := checkRedirect(&http.Request{URL: &url.URL{Scheme: "http", Host: inside}}, via); err == nil {
			t.Errorf("redirect from outside to %s is followed", inside)
		}
	}
}

func TestCutConnectionsAreResumed(t *testing.T) {
	for _, ranges := range []bool{true, false} {
		t.Run(fmt.Sprint("ranges ", ranges), func(t *testing.T) {
			h, s := newHub(t), openStore(t, Config{})
			l := layerOf(t, "", file("f", strings.Repeat("0123456789", 100_000)))
			h.push(t, "app:1", imageOf(t, l))
			cuts := atomic.Int32{}
			h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, sum(l.blob)) {
					return false
				}
				if !ranges {
					r.Header.Del("Range")
				}
				if cuts.Add(1) > 7 {
					return false
				}
				var from int
				if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
					from = 0
				}
				rest := l.blob[from:]
				if from > 0 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(l.blob)-1, len(l.blob)))
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
				if from > 0 {
					w.WriteHeader(http.StatusPartialContent)
				}
				send(w, rest[:min(len(rest), 120_000*int(cuts.Load()))])
				panic(http.ErrAbortHandler)
			})
			pull(t, s, h.host+"/app:1")
			if got := len(h.seen(sum(l.blob), "bytes=")); got < 2 {
				t.Errorf("%d range requests", got)
			}
			if body := read(t, s.layerDir(l.diffID)+"/diff/f"); body != strings.Repeat("0123456789", 100_000) {
				t.Error("the file is not what was sent")
			}
		})
	}
}

func TestServerThatNeverDeliversIsGivenUp(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	for name, serve := range map[string]func(w http.ResponseWriter, r *http.Request){
		"cut": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "500")
			panic(http.ErrAbortHandler)
		},
		"stall": func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
		"503": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) },
	} {
		h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				serve(w, r)
				return true
			}
			return false
		})
		start := time.Now()
		_, err := s.Pull(context.Background(), h.host+"/app:1", nil)
		if !errors.Is(err, ErrUnavailable) || time.Since(start) > 20*time.Second {
			t.Errorf("%s: %v after %v", name, err, time.Since(start))
		}
	}
}

func TestStalledBlobIsResumed(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := layerOf(t, "", file("f", strings.Repeat("z", 100_000)))
	h.push(t, "app:1", imageOf(t, l))
	first := atomic.Bool{}
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, sum(l.blob)) || first.Swap(true) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(l.blob)))
		send(w, l.blob[:5000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	pull(t, s, h.host+"/app:1")
	if len(h.seen("bytes=5000-")) != 1 {
		t.Errorf("requests: %v", h.seen(sum(l.blob)))
	}
}

func TestBusyRegistryIsAskedAgain(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	counts := map[string]int{}
	busy := func(status int, after string, times int) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			counts[r.URL.Path]++
			if counts[r.URL.Path] > times {
				return false
			}
			w.Header().Set("Retry-After", after)
			w.WriteHeader(status)
			return true
		}
	}
	h.Config.SetKeepAlivesEnabled(true)
	h.intercept(busy(http.StatusTooManyRequests, "1", 1))
	start := time.Now()
	pull(t, s, h.host+"/app:1")
	if waited := time.Since(start); waited < 2*time.Second {
		t.Errorf("waited %v, want a second for /v2/ and one for the manifest at least", waited)
	}
	clear(counts)
	h.intercept(busy(http.StatusBadGateway, "", 3))
	pull(t, s, h.host+"/app:1")

	clear(counts)
	h.intercept(busy(http.StatusTooManyRequests, "86400", 1000))
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "429") {
		t.Errorf("a registry that wants a day: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	clear(counts)
	h.intercept(busy(http.StatusTooManyRequests, "1", 1000))
	if _, err := s.Pull(ctx, h.host+"/app:1", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a deadline: %v", err)
	}
}

func TestWrongDigestsFromTheRegistry(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("a", "x"))
	img := imageOf(t, l)
	h.push(t, "app:1", img)
	wrong := gzipLayer(t, file("a", "y"))
	for name, part := range map[string]string{"layer": sum(l.blob), "configuration": mustConfig(t, img), "manifest": digestOfImage(t, img)} {
		h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, part) && r.Method == http.MethodGet {
				send(w, wrong.blob[:min(len(wrong.blob), len(l.blob))])
				return true
			}
			return false
		})
		_, err := s.Pull(context.Background(), h.host+"/app@"+digestOfImage(t, img), nil)
		if !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(s.index.layers); n != 0 {
		t.Errorf("%d layers left", n)
	}
}
