package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/goleak"
)

func TestPullUnpacksEveryFormat(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	for _, compressed := range []string{"", compressedGzip, compressedZstd} {
		t.Run("compressed "+compressed, func(t *testing.T) {
			l := layerOf(t, compressed, dir("bin", 0o755), file("bin/true", "program "+compressed))
			base := imageOf(t, l)
			docker := mutate.ConfigMediaType(mutate.MediaType(base, types.DockerManifestSchema2), types.DockerConfigJSON)
			for kind, img := range map[string]v1.Image{"oci": base, "schema2": docker} {
				ref := h.host + "/team/app:" + kind + compressed
				id := h.push(t, "team/app:"+kind+compressed, img)
				got := pull(t, s, ref)
				if got.ID != id || !slices.Contains(got.RepoTags, ref) || !slices.Contains(got.RepoDigests, h.host+"/team/app@"+digestOfImage(t, img)) {
					t.Errorf("%s: %+v, want id %s", kind, got, id)
				}
				if got.Size == 0 || !slices.Equal(got.Config.Cmd, []string{"/bin/true"}) {
					t.Errorf("%s: size %d, config %+v", kind, got.Size, got.Config)
				}
				if body := read(t, s.layerDir(l.diffID)+"/diff/bin/true"); body != "program "+compressed {
					t.Errorf("%s: bin/true = %q", kind, body)
				}
			}
		})
	}
}

func TestPullNames(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	img := imageOf(t, gzipLayer(t, file("a", "1")))
	id := h.push(t, "app", img)
	digest := digestOfImage(t, img)
	byDigest := pull(t, s, h.host+"/app@"+digest)
	if byDigest.ID != id || len(byDigest.RepoTags) != 0 || !slices.Equal(byDigest.RepoDigests, []string{h.host + "/app@" + digest}) {
		t.Errorf("by digest: %+v", byDigest)
	}
	both := pull(t, s, h.host+"/app:whatever@"+digest)
	if both.ID != id || len(both.RepoTags) != 0 {
		t.Errorf("by tag and digest: %+v", both)
	}
	noTag := pull(t, s, h.host+"/app")
	if !slices.Equal(noTag.RepoTags, []string{h.host + "/app:latest"}) {
		t.Errorf("without a tag: %+v", noTag)
	}
	for _, ref := range []string{id, idHex(id), idHex(id)[:12], "sha256:" + idHex(id)[:8], h.host + "/app", h.host + "/app:latest", h.host + "/app@" + digest, h.host + "/app:other@" + digest} {
		if got, err := s.Get(ref); err != nil || got.ID != id {
			t.Errorf("Get(%s) = %v, %v", ref, got.ID, err)
		}
	}
	for ref, want := range map[string]error{
		h.host + "/app:none": ErrNotFound, "fedcba": ErrNotFound, "": ErrInvalid, "UPPER": ErrInvalid,
		"http://x/y": ErrInvalid, "a@sha256:12": ErrInvalid, strings.Repeat("a", 2000): ErrInvalid,
	} {
		if _, err := s.Get(ref); !errors.Is(err, want) {
			t.Errorf("Get(%.50q): %v, want %v", ref, err, want)
		}
	}
	if _, err := s.Pull(context.Background(), h.host+"/app:none", nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("pull of a missing tag: %v", err)
	}
}

func TestReferenceNormalisation(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"busybox": "docker.io/library/busybox:latest", "team/app:1": "docker.io/team/app:1",
		"docker.io/busybox": "docker.io/library/busybox:latest", "index.docker.io/library/busybox:1": "docker.io/library/busybox:1",
		"localhost/foo": "localhost/foo:latest", "localhost:5000/a/b:c": "localhost:5000/a/b:c",
		"registry.k8s.io/pause:3.9": "registry.k8s.io/pause:3.9", "busybox@" + d: "docker.io/library/busybox@" + d,
		"busybox:1@" + d: "docker.io/library/busybox@" + d, "[::1]:5000/x": "[::1]:5000/x:latest",
	} {
		ref, err := parseReference(in)
		if err != nil || ref.String() != want {
			t.Errorf("parseReference(%q) = %v, %v; want %s", in, ref, err, want)
		}
	}
}

func TestIndexByPlatform(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	other := "arm64"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	mine, theirs := imageOf(t, gzipLayer(t, file("arch", "mine"))), imageOf(t, gzipLayer(t, file("arch", "theirs")))
	add := func(img v1.Image, p v1.Platform) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}}
	}
	index := mutate.AppendManifests(empty.Index, add(theirs, v1.Platform{OS: "linux", Architecture: other}),
		add(theirs, v1.Platform{OS: "windows", Architecture: runtime.GOARCH}),
		add(theirs, v1.Platform{OS: "unknown", Architecture: "unknown"}), add(mine, v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	h.pushIndex(t, "multi:1", index)
	h.pushIndex(t, "multi:nested", mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index}))
	id, err := mine.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	got := pull(t, s, h.host+"/multi:1")
	if got.ID != id.String() || !slices.Equal(got.RepoDigests, []string{h.host + "/multi@" + digestOfImage(t, index)}) {
		t.Errorf("got %+v, want id %s and the index's digest", got, id)
	}
	if got := pull(t, s, h.host+"/multi:nested"); got.ID != id.String() {
		t.Errorf("nested: got %s", got.ID)
	}
	h.pushIndex(t, "multi:none", mutate.AppendManifests(empty.Index, add(theirs, v1.Platform{OS: "linux", Architecture: other})))
	if _, err := s.Pull(context.Background(), h.host+"/multi:none", nil); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "linux/"+other) {
		t.Errorf("no manifest for this machine: %v", err)
	}
}

func TestVariants(t *testing.T) {
	d := func(variant string) v1.Descriptor {
		return v1.Descriptor{Size: int64(len(variant)), Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH, Variant: variant}}
	}
	best := variants()[0]
	got, err := choosePlatform([]v1.Descriptor{d("v99"), d(variants()[1]), d(best)})
	if err != nil || got.Platform.Variant != best {
		t.Errorf("chose %v, %v; want %q", got.Platform, err, best)
	}
	if _, err := choosePlatform([]v1.Descriptor{d("v99")}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a variant that no machine has: %v", err)
	}
	if _, err := choosePlatform([]v1.Descriptor{{}}); err != nil {
		t.Errorf("a single entry without a platform: %v", err)
	}
}

func TestWhatIsNoImageIsRefused(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	helm := mutate.ConfigMediaType(imageOf(t, gzipLayer(t, file("a", ""))), "application/vnd.cncf.helm.config.v1+json")
	h.push(t, "helm:1", helm)
	h.push(t, "ok:1", imageOf(t, gzipLayer(t, file("a", "x"))))
	_, err := s.Pull(context.Background(), h.host+"/helm:1", nil)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "helm") {
		t.Errorf("helm chart: %v", err)
	}
	for name, body := range map[string]string{
		"schema 1": `{"schemaVersion":1,"fsLayers":[]}`, "not JSON": `<html>`, "neither": `{"schemaVersion":2}`,
		"layers do not match": `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}`,
	} {
		h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case strings.Contains(r.URL.Path, "/manifests/"):
				fmt.Fprint(w, body)
			case strings.Contains(r.URL.Path, "/blobs/"):
				fmt.Fprint(w, "{}")
			default:
				return false
			}
			return true
		})
		if _, err := s.Pull(context.Background(), h.host+"/ok:1", nil); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTwoPullsOfOneLayerDoTheWorkOnce(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	shared := gzipLayer(t, file("shared", strings.Repeat("x", 1<<16)))
	for i := range 4 {
		h.push(t, fmt.Sprintf("app%d:1", i), imageOf(t, shared, gzipLayer(t, file("own", fmt.Sprint(i)))))
	}
	h.intercept(func(http.ResponseWriter, *http.Request) bool { time.Sleep(2 * time.Millisecond); return false })
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() { pull(t, s, fmt.Sprintf("%s/app%d:1", h.host, i%4)) })
	}
	wg.Wait()
	if got := h.seen("GET", "/blobs/"+sum(shared.blob)); len(got) != 1 {
		t.Errorf("the shared layer was fetched %d times", len(got))
	}
	if got := h.seen("GET", "/app0/manifests/1"); len(got) > 3 {
		t.Errorf("one image's manifest was fetched %d times", len(got))
	}
	if n := len(s.index.layers); n != 5 {
		t.Errorf("%d layers, want 5", n)
	}
}

// A pull that joined another's work does not inherit the other's failure.
func TestCancelledPullLeavesTheWorkToTheOther(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	h.push(t, "app:2", imageOf(t, l, gzipLayer(t, file("g", "y"))))
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, sum(l.blob)) {
			once.Do(func() { close(blocked) })
			<-release
		}
		return false
	})
	ctx, cancel := context.WithCancel(context.Background())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.Pull(ctx, h.host+"/app:1", nil); first <- err }()
	<-blocked
	go func() { _, err := s.Pull(context.Background(), h.host+"/app:2", nil); second <- err }()
	time.Sleep(50 * time.Millisecond)
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled pull: %v", err)
	}
	close(release)
	if err := <-second; err != nil {
		t.Errorf("the other pull: %v", err)
	}
	if n := len(s.index.images); n != 1 {
		t.Errorf("%d images", n)
	}
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	small, large := gzipLayer(t, file("f", "x")), layerOf(t, "", file("g", strings.Repeat("y", 1<<20)))
	h.push(t, "app:1", imageOf(t, small, large))
	ctx, cancel := context.WithCancel(context.Background())
	h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, sum(large.blob)) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(large.blob)))
		send(w, large.blob[:1<<19])
		w.(http.Flusher).Flush()
		for s.index.layer(small.diffID) == nil {
			time.Sleep(time.Millisecond)
		}
		cancel()
		<-r.Context().Done()
		return true
	})
	if _, err := s.Pull(ctx, h.host+"/app:1", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v", err)
	}
	if len(s.index.layers) != 0 || len(s.index.images) != 0 {
		t.Errorf("%d layers, %d images left", len(s.index.layers), len(s.index.images))
	}
	h.intercept(nil)
	pull(t, s, h.host+"/app:1")
}

func TestCloseEndsPulls(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	h := newHub(t)
	h.push(t, "app:1", imageOf(t, gzipLayer(t, file("f", "x"))))
	s, err := Open(Config{Root: t.TempDir(), DockerConfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	hit := make(chan struct{}, 1)
	h.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			select {
			case hit <- struct{}{}:
			default:
			}
			<-r.Context().Done()
			return true
		}
		return false
	})
	done := make(chan error, 1)
	go func() { _, err := s.Pull(context.Background(), h.host+"/app:1", nil); done <- err }()
	<-hit
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("pull: %v", err)
	}
	if _, err := s.Pull(context.Background(), h.host+"/app:1", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("pull of a closed store: %v", err)
	}
	h.CloseClientConnections()
	h.Server.Close()
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if c, ok := h.Client().Transport.(*http.Transport); ok {
		c.CloseIdleConnections()
	}
}

func TestTagMoves(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	first := imageOf(t, gzipLayer(t, file("v", "1")))
	id1 := h.push(t, "app:1", first)
	h.push(t, "app:kept", first)
	pull(t, s, h.host+"/app:1")
	pull(t, s, h.host+"/app:kept")
	id2 := h.push(t, "app:1", imageOf(t, gzipLayer(t, file("v", "2"))))
	pull(t, s, h.host+"/app:1")
	for pass := range 2 {
		one, err := s.Get(id1)
		if err != nil || !slices.Equal(one.RepoTags, []string{h.host + "/app:kept"}) || len(one.RepoDigests) != 1 {
			t.Errorf("pass %d: the old image is %+v, %v", pass, one, err)
		}
		if two, err := s.Get(h.host + "/app:1"); err != nil || two.ID != id2 {
			t.Errorf("pass %d: the tag is at %s, %v", pass, two.ID, err)
		}
		s = reopen(t, s)
	}
}

// reopen closes the store and opens its directory again.
func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openStore(t, s.cfg)
}

func TestRemove(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	shared, own := gzipLayer(t, file("s", "")), gzipLayer(t, file("o", ""))
	img := imageOf(t, shared, own)
	id := h.push(t, "a:1", img)
	h.push(t, "b/c:2", img)
	h.push(t, "other:1", imageOf(t, shared))
	for _, ref := range []string{"/a:1", "/b/c:2", "/other:1"} {
		pull(t, s, h.host+ref)
	}
	if img, err := s.Get(id); err != nil || len(img.RepoTags) != 2 || len(img.RepoDigests) != 2 {
		t.Fatalf("%+v, %v", img, err)
	}
	for range 2 { // by one tag all tags go; again is no error
		if err := s.Remove(h.host + "/a:1"); err != nil {
			t.Fatal(err)
		}
	}
	for _, ref := range []string{id, h.host + "/b/c:2"} {
		if _, err := s.Get(ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("Get(%s) after removal: %v", ref, err)
		}
	}
	if s.index.layer(shared.diffID) == nil || s.index.layer(own.diffID) != nil {
		t.Error("the shared layer must stay, the other go")
	}
	if err := s.Remove(h.host + "/other:1"); err != nil {
		t.Fatal(err)
	}
	if bytes, inodes := s.Usage(); bytes != 0 || inodes != 0 {
		t.Errorf("usage of an empty store: %d bytes, %d inodes", bytes, inodes)
	}
}

func TestOneStoreOneProcess(t *testing.T) {
	s := openStore(t, Config{})
	if st := lstat(t, s.Root()); st.Mode&0o7777 != 0o700 {
		t.Errorf("the root has mode %o: others could run setuid programs of images", st.Mode&0o7777)
	}
	if _, err := Open(s.cfg); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v", err)
	}
}

func TestRecovery(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	id := h.push(t, "good:1", imageOf(t, gzipLayer(t, file("g", ""))))
	badID := h.push(t, "bad:1", imageOf(t, gzipLayer(t, file("b", ""))))
	tornID := h.push(t, "torn:1", imageOf(t, gzipLayer(t, file("t", ""))))
	lost := gzipLayer(t, file("l", ""))
	lostID := h.push(t, "lost:1", imageOf(t, lost))
	for _, ref := range []string{"/good:1", "/bad:1", "/torn:1", "/lost:1"} {
		pull(t, s, h.host+ref)
	}
	waitSynced(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw := read(t, s.imageFile(badID))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(s.imageFile(badID), bytes.Replace([]byte(raw), []byte(`"config":"e`), []byte(`"config":"f`), 1), 0o600))
	must(os.WriteFile(s.imageFile(tornID), []byte(read(t, s.imageFile(tornID))[:40]), 0o600))
	// A layer whose machine went down before it was on disk.
	var rec layerRecord
	file := filepath.Join(s.layerDir(lost.diffID), "layer.json")
	must(readRecord(file, &rec))
	rec.Synced, rec.BootID = false, "another boot"
	must(s.writeRecord(file, &rec))
	// What a process that was killed leaves.
	must(os.MkdirAll(s.path("tmp", "layer-XYZ", "diff", "d"), 0o755))
	must(os.MkdirAll(s.layerDir(sum([]byte("no record")))+"/diff", 0o755))
	must(os.WriteFile(s.path("images", ".tmp-1"), []byte("{"), 0o600))
	must(os.MkdirAll(s.path("fix", strings.Repeat("a", 64)), 0o755))

	var logged bytes.Buffer
	cfg := s.cfg
	cfg.Log = textLog(&logged)
	s = openStore(t, cfg)
	if _, err := s.Get(id); err != nil {
		t.Errorf("the good image: %v", err)
	}
	for _, gone := range []string{badID, tornID, lostID} {
		if _, err := s.Get(gone); !errors.Is(err, ErrNotFound) {
			t.Errorf("image %s: %v", gone, err)
		}
	}
	aside, err := os.ReadDir(s.path("corrupt"))
	must(err)
	if len(aside) != 2 || !strings.Contains(logged.String(), aside[0].Name()) || !strings.Contains(logged.String(), s.imageFile(badID)) {
		t.Errorf("set aside %v; log:\n%s", aside, logged.String())
	}
	if n := len(s.index.layers); n != 1 {
		t.Errorf("%d layers, want the good image's", n)
	}
	pull(t, s, h.host+"/lost:1")
	for range 1000 { // the background goroutine removes the rest
		if entries, err := os.ReadDir(s.path("tmp")); err == nil && len(entries) == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Error("tmp is not empty")
}

func TestLaterVersionIsLeftAlone(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	id := h.push(t, "app:1", imageOf(t, gzipLayer(t, file("g", ""))))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw := read(t, s.imageFile(id))
	if err := os.WriteFile(s.imageFile(id), []byte(strings.Replace(raw, `"version":1`, `"version":2`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	two, err := Open(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Get(id); !errors.Is(err, ErrNotFound) {
		t.Errorf("a record of version 2 is served: %v", err)
	}
	if err := two.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.imageFile(id), []byte(raw), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(t, s.cfg).Get(id); err != nil {
		t.Errorf("back at the version that wrote it: %v", err)
	}
}

func waitSynced(t testing.TB, s *Store) {
	t.Helper()
	for range 2000 {
		if len(s.index.unsynced()) == 0 {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("layers are not synced")
}

// TestRecordOfALayerThatGoes: a layer may be thrown away between the moment at which its record is to be written and
// the writing. Its directory must not get a file then, or it could not be emptied.
func TestRecordOfALayerThatGoes(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, file("f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	rec := *s.index.layer(l.diffID)
	trash, err := s.trash(s.layerDir(l.diffID))
	if err != nil {
		t.Fatal(err)
	}
	before := read(t, filepath.Join(trash, "layer.json"))
	rec.Synced = false
	if err := s.writeRecord(filepath.Join(s.layerDir(l.diffID), "layer.json"), &rec); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("write: %v", err)
	}
	if read(t, filepath.Join(trash, "layer.json")) != before {
		t.Error("the record of a layer that was thrown away was changed")
	}
	if err := os.Rename(trash, s.layerDir(l.diffID)); err != nil {
		t.Fatal(err)
	}
	checkStore(t, s)
}

func TestSyncMarksLayers(t *testing.T) {
	h, s := newHub(t), openStore(t, Config{})
	l := gzipLayer(t, dir("d", 0), file("d/f", "x"))
	h.push(t, "app:1", imageOf(t, l))
	pull(t, s, h.host+"/app:1")
	waitSynced(t, s)
	var rec layerRecord
	if err := readRecord(s.layerDir(l.diffID)+"/layer.json", &rec); err != nil || !rec.Synced {
		t.Errorf("%+v, %v", rec, err)
	}
}
