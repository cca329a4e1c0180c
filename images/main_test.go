package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		crashChild()
		return
	}
	if nstest.InNamespace() {
		if err := errors.Join(loopbackUp(), worldUp()); err != nil {
			fmt.Fprintln(os.Stderr, "make a network:", err)
			os.Exit(1)
		}
	}
	nstest.Main(m)
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// The world, on loopback: an address that is nobody's own, and names.
const (
	farAddress = "198.51.100.10"
	hostsFile  = "127.0.0.1 localhost inside.example\n" + farAddress + " example.com far.example\n10.11.12.13 lan.example\n169.254.1.2 link.example\n"
)

func worldUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(farAddress + "/32")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(lo, addr); errors.Is(err, unix.EEXIST) {
		return nil // a worker of the fuzzer, in the namespaces of its parent
	} else if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "hosts-*")
	if err != nil {
		return err
	}
	if _, err := f.WriteString(hostsFile); err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Chmod(f.Name(), 0o644), unix.Mount(f.Name(), "/etc/hosts", "", unix.MS_BIND, ""), os.Remove(f.Name()))
}

// entry is one entry of a layer's archive.
type entry struct {
	name, link string
	kind       byte
	mode       int64
	uid, gid   int
	body       string
	pax        map[string]string
}

func file(name, body string) entry {
	return entry{name: name, body: body, kind: tar.TypeReg, mode: 0o644}
}
func dir(name string, mode int64) entry {
	return entry{name: name, kind: tar.TypeDir, mode: mode}
}
func symlink(name, to string) entry {
	return entry{name: name, link: to, kind: tar.TypeSymlink, mode: 0o777}
}
func hardlink(name, to string) entry {
	return entry{name: name, link: to, kind: tar.TypeLink, mode: 0o644}
}
func whiteout(name string) entry { return entry{name: name, kind: tar.TypeReg} }

var testTime = time.Unix(1_600_000_000, 0)

func archiveOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			Size: int64(len(e.body)), ModTime: testTime, PAXRecords: e.pax}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// testLayer is a layer with a compression of the test's choice.
type testLayer struct {
	blob      []byte
	diffID    string
	mediaType types.MediaType
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

func (l *testLayer) Digest() (v1.Hash, error) { return mustHash(sum(l.blob)), nil }
func (l *testLayer) DiffID() (v1.Hash, error) { return mustHash(l.diffID), nil }
func (l *testLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l *testLayer) Uncompressed() (io.ReadCloser, error) { return decompress(bytes.NewReader(l.blob)) }
func (l *testLayer) Size() (int64, error)                 { return int64(len(l.blob)), nil }
func (l *testLayer) MediaType() (types.MediaType, error)  { return l.mediaType, nil }
func gzipLayer(t testing.TB, entries ...entry) *testLayer {
	return layerOf(t, compressedGzip, entries...)
}

func layerOf(t testing.TB, compressed string, entries ...entry) *testLayer {
	t.Helper()
	return compressLayer(t, compressed, archiveOf(t, entries...))
}

func compressLayer(t testing.TB, compressed string, raw []byte) *testLayer {
	t.Helper()
	l := &testLayer{blob: raw, diffID: sum(raw), mediaType: types.OCIUncompressedLayer}
	var buf bytes.Buffer
	var w io.WriteCloser
	switch compressed {
	case compressedGzip:
		w, l.mediaType = gzip.NewWriter(&buf), types.OCILayer
	case compressedZstd:
		zw, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w, l.mediaType = zw, types.OCILayerZStd
	default:
		return l
	}
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l.blob = buf.Bytes()
	return l
}

func imageOf(t testing.TB, layers ...*testLayer) v1.Image {
	t.Helper()
	return imageWith(t, v1.Config{Cmd: []string{"/bin/true"}, Env: []string{"A=b"}}, layers...)
}

func imageWith(t testing.TB, config v1.Config, layers ...*testLayer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	var adds []mutate.Addendum
	for _, l := range layers {
		adds = append(adds, mutate.Addendum{Layer: l, MediaType: l.mediaType})
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		t.Fatal(err)
	}
	f, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	f = f.DeepCopy()
	f.Config, f.OS, f.Architecture = config, "linux", runtime.GOARCH
	if img, err = mutate.ConfigFile(img, f); err != nil {
		t.Fatal(err)
	}
	return img
}

var discardLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)

// send writes a part of an answer; a client that has gone away is what some tests want.
func send(w io.Writer, body []byte) { _, _ = w.Write(body) }

// hub is a registry on loopback with a hook in front.
type hub struct {
	*httptest.Server
	host string
	mu   sync.Mutex
	// hook answers a request itself, and says so.
	hook     func(w http.ResponseWriter, r *http.Request) bool
	requests []string // "GET /v2/… Authorization"
}

func newHub(t testing.TB) *hub {
	t.Helper()
	h := &hub{}
	h.Server = httptest.NewServer(h.handler())
	t.Cleanup(h.Close)
	h.host = strings.TrimPrefix(h.URL, "http://")
	return h
}

func newTLSHub(t testing.TB) *hub {
	t.Helper()
	h := &hub{}
	h.Server = httptest.NewUnstartedServer(h.handler())
	h.Config.ErrorLog = discardLog
	h.StartTLS()
	t.Cleanup(h.Close)
	h.host = strings.TrimPrefix(h.URL, "https://")
	return h
}

func (h *hub) handler() http.Handler {
	inner := registry.New(registry.Logger(discardLog))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		hook := h.hook
		h.requests = append(h.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")+" "+r.Header.Get("Authorization")))
		h.mu.Unlock()
		if hook != nil && hook(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	})
}

func (h *hub) intercept(hook func(w http.ResponseWriter, r *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hook, h.requests = hook, nil
}

// seen returns the requests that contain all of what since the last intercept.
func (h *hub) seen(what ...string) (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
next:
	for _, r := range h.requests {
		for _, w := range what {
			if !strings.Contains(r, w) {
				continue next
			}
		}
		out = append(out, r)
	}
	return out
}

// push stores an image, and returns its id.
func (h *hub) push(t testing.TB, repoTag string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(h.host+"/"+repoTag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := ggcr.Write(ref, img, ggcr.WithTransport(h.Client().Transport)); err != nil {
		t.Fatal(err)
	}
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

func (h *hub) pushIndex(t testing.TB, repoTag string, index v1.ImageIndex) {
	t.Helper()
	ref, err := name.ParseReference(h.host+"/"+repoTag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := ggcr.WriteIndex(ref, index, ggcr.WithTransport(h.Client().Transport)); err != nil {
		t.Fatal(err)
	}
}

func digestOfImage(t testing.TB, img interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

var fastWaits = waits{dial: 10 * time.Second, header: 10 * time.Second, stall: 300 * time.Millisecond, least: 4 << 10, patience: time.Minute, backoff: time.Millisecond, maxBackoff: 10 * time.Millisecond, retryAfter: 2 * time.Second,
	settle: 10 * time.Millisecond, resync: 20 * time.Millisecond}

// openStore opens a store in a fresh directory, which the test's end checks to hold nothing that it should not.
func openStore(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.Root == "" {
		cfg.Root = filepath.Join(t.TempDir(), "images")
	}
	if cfg.DockerConfig == "" {
		cfg.DockerConfig = "/nonexistent/config.json"
	}
	cfg.waits = fastWaits
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.life.closed { // by the test, which may have opened the directory again
			return
		}
		for _, kind := range []string{kindRootfs, kindVolume} {
			for _, key := range s.index.mountKeys(kind) {
				if err := s.unmountImage(kind, strings.TrimPrefix(key, kind+"/")); err != nil {
					t.Error(err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		checkStore(t, s)
	})
	return s
}

// checkStore compares disk and memory: nothing in tmp, a directory for each layer and no other, a record for
// each image and no other.
func checkStore(t testing.TB, s *Store) {
	t.Helper()
	names := func(sub string) map[string]bool {
		out := map[string]bool{}
		entries, err := os.ReadDir(s.path(sub))
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			out[e.Name()] = true
		}
		return out
	}
	if left := names("tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
	layers := names("layers")
	for d := range s.index.layers {
		if !layers[dirName(d)] {
			t.Errorf("layer %s is in the index and not on disk", d)
		}
		delete(layers, dirName(d))
	}
	if len(layers) > 0 {
		t.Errorf("layers on disk that nobody knows: %v", layers)
	}
	images := names("images")
	for id, r := range s.index.images {
		if !images[idHex(id)+".json"] {
			t.Errorf("image %s is in the index and not on disk", id)
		}
		delete(images, idHex(id)+".json")
		if lost := s.missing(r.Layers); len(lost) > 0 {
			t.Errorf("image %s lacks layers %v", id, lost)
		}
	}
	if len(images) > 0 {
		t.Errorf("image records on disk that nobody knows: %v", images)
	}
	if len(s.index.pins) > 0 {
		t.Errorf("pins left: %v", s.index.pins)
	}
}

func pull(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	img, err := s.Pull(context.Background(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func mount(t testing.TB, s *Store, id, image string) string {
	t.Helper()
	path, err := s.MountRootfs(context.Background(), id, image)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func mustConfig(t testing.TB, img v1.Image) string {
	t.Helper()
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

// redial makes a transport reach one address, whatever name it was asked for.
func redial(addr string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
}
