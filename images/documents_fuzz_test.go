package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// tagged is a source of documents by digest, and of one by tag.
type tagged struct {
	top, mediaType string
	byDigest       map[string][]byte
	asked          int
}

func (d *tagged) document(_ context.Context, _, id string) ([]byte, string, error) {
	d.asked++
	if id == "1" {
		id = d.top
	}
	raw, ok := d.byDigest[id]
	if !ok {
		return nil, "", fmt.Errorf("%w: %.100q", ErrNotFound, id)
	}
	return raw, d.mediaType, nil
}

// chain puts the digest of each document into the one before it, in the place of the word for it, so that what the fuzzer
// makes of one is reached from the first.
func chain(mediaType string, docs ...string) *tagged {
	d := &tagged{mediaType: mediaType, byDigest: map[string][]byte{}}
	for i := len(docs) - 1; i >= 0; i-- {
		raw := []byte(strings.ReplaceAll(docs[i], "NEXT", d.top))
		d.top = sum(raw)
		d.byDigest[d.top] = raw
	}
	return d
}

// hasClass: callers can tell what went wrong.
func hasClass(err error) bool { return status.Code(grpcError(err)) != codes.Unknown }

// FuzzDocuments feeds an index, an index in it, a manifest and a configuration to what reads them. What it takes has what
// the rest of the store relies on, and can be shown to clients and written down.
func FuzzDocuments(f *testing.F) {
	platform := `"platform":{"os":"linux","architecture":"` + runtime.GOARCH + `"}`
	index := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"NEXT","size":1,` + platform + `}]}`
	layer := `{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"` + sum([]byte("blob")) + `","size":4}`
	manifest := `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"NEXT","size":1},"layers":[` + layer + `],"annotations":{"a":"b"}}`
	config := `{"os":"linux","architecture":"` + runtime.GOARCH + `","config":{"User":"5:6","Env":["A=b"],"Labels":{"l":"v"},"Volumes":{"/v":{}},"StopSignal":"SIGTERM"},"rootfs":{"type":"layers","diff_ids":["` + sum([]byte("tar")) + `"]},"history":[{"created":"2020-01-01T00:00:00Z"}]}`
	docker := strings.ReplaceAll(strings.ReplaceAll(manifest, "vnd.oci.image.config.v1", "vnd.docker.container.image.v1"), `{"schemaVersion":2`, `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json"`)
	f.Add("", index, index, manifest, config)
	f.Add("application/vnd.docker.distribution.manifest.list.v2+json", strings.ReplaceAll(index, platform, `"annotations":{}`), "", docker, config)
	f.Add("text/plain", `{"schemaVersion":1}`, `[]`, manifest, `null`)
	f.Add("", index, index, manifest, "")          // nothing is the end of a file to the reader, and a refusal to the caller
	f.Add("", index, index, manifest, config+"00") // it was taken, and could not be shown
	f.Add("", "", "", strings.ReplaceAll(manifest, layer, layer+","+layer), strings.ReplaceAll(config, `"rootfs"`, `"variant":"v8","rootfs"`))
	s := openStore(f, Config{})
	f.Fuzz(func(t *testing.T, mediaType, outer, inner, manifest, config string) {
		for _, docs := range [][]string{{outer, inner, manifest, config}, {outer, manifest, config}, {manifest, config}} {
			source := chain(mediaType, docs...)
			img, err := resolve(context.Background(), source, "1")
			if source.asked > maxIndexDepth+3 {
				t.Errorf("%d documents were asked for", source.asked)
			}
			if err != nil {
				if !hasClass(err) {
					t.Errorf("error without a class: %v", err)
				}
				continue
			}
			checkResolved(t, s, source, img)
		}
	})
}

func checkResolved(t *testing.T, s *Store, source *tagged, img *resolved) {
	t.Helper()
	if img.top != source.top || img.id != sum(img.configBytes) || len(img.layers) > maxLayers || source.byDigest[img.manifest] == nil {
		t.Errorf("%+v", img)
	}
	diffIDs := make([]string, 0, len(img.layers))
	for _, l := range img.layers {
		if name := dirName(l.DiffID); name != filepath.Base(name) || !strings.HasPrefix(name, "sha") || l.Size < 0 {
			t.Errorf("%+v", l)
		}
		if _, err := v1.NewHash(l.Digest); err != nil {
			t.Error(err)
		}
		diffIDs = append(diffIDs, l.DiffID)
	}
	if _, err := s.roomFor(img.layers); err != nil && !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	rec := &imageRecord{Version: recordVersion, ID: img.id, Tags: map[string]int64{"a/b:1": 1}, Layers: diffIDs, Config: img.configBytes,
		Manifest: img.manifest, Annotations: img.annotations, Pulled: now(), file: img.config}
	if _, err := json.Marshal(rec); err != nil {
		t.Errorf("it cannot be written down: %v", err)
	}
	if _, err := proto.Marshal(rec.proto()); err != nil {
		t.Errorf("it cannot be shown: %v", err)
	}
	if _, err := s.verbose(rec); err != nil {
		t.Errorf("it cannot be described: %v", err)
	}
}

// FuzzArchiveDocuments feeds an archive's own documents, of both formats, to an import.
func FuzzArchiveDocuments(f *testing.F) {
	config := `{"os":"linux","architecture":"` + runtime.GOARCH + `","rootfs":{"type":"layers","diff_ids":["LAYER"]}}`
	f.Add(`[{"Config":"CONFIG.json","RepoTags":["a/b:1"],"Layers":["layer.tar"]}]`, "", "", config)
	f.Add("", `{"schemaVersion":2,"manifests":[{"digest":"MANIFEST","size":1,"annotations":{"io.containerd.image.name":"a/b:1"}}]}`,
		`{"schemaVersion":2,"config":{"digest":"CONFIG"},"layers":[{"digest":"LAYER","size":2048}]}`, config)
	layer := archiveOf(f, file("f", "x"))
	s := openStore(f, Config{})
	f.Fuzz(func(t *testing.T, docker, index, manifest, config string) {
		config = strings.ReplaceAll(config, "LAYER", sum(layer))
		words := strings.NewReplacer("LAYER", sum(layer), "CONFIG.json", idHex(sum([]byte(config)))+".json", "CONFIG", sum([]byte(config)))
		manifest = words.Replace(manifest)
		entries := []entry{file(idHex(sum([]byte(config)))+".json", config), file(blobPath(sum([]byte(config))), config), file("layer.tar", string(layer)),
			file(blobPath(sum(layer)), string(layer)), file(blobPath(sum([]byte(manifest))), manifest)}
		if docker != "" {
			entries = append(entries, file("manifest.json", words.Replace(docker)))
		}
		if index != "" {
			entries = append(entries, file("index.json", strings.ReplaceAll(words.Replace(index), "MANIFEST", sum([]byte(manifest)))))
		}
		imported, err := s.Import(context.Background(), bytes.NewReader(archiveOf(t, entries...)), "")
		if err != nil && !hasClass(err) {
			t.Errorf("error without a class: %v", err)
		}
		for _, img := range imported {
			if err := s.Remove(img.ID); err != nil {
				t.Error(err)
			}
		}
		settle(s)
		expectEmpty(t, s)
	})
}

// FuzzChallenge feeds what a registry and its token server say before there is a token: the library reads it, and what it
// makes of it must neither last, nor take the password to where it does not belong.
func FuzzChallenge(f *testing.F) {
	for _, challenge := range []string{`Bearer realm="HUB/token",service="s",scope="repository:app:pull"`, `Basic realm="x"`, `Bearer realm="http://far.example:1/token"`,
		`Negotiate, Bearer realm="HUB/token"`, `Bearer realm=`, `Bearer realm="\`, `Digest realm="x", nonce="y"`} {
		f.Add(challenge, []byte(`{"token":"granted","refresh_token":"r","expires_in":1}`), "3")
	}
	h, s := newHub(f), openStore(f, Config{})
	h.push(f, "app:1", imageOf(f, gzipLayer(f, file("a", "x"))))
	s.cfg.waits.patience, s.cfg.waits.retryAfter = 200*time.Millisecond, 10*time.Millisecond
	f.Fuzz(func(t *testing.T, challenge string, answer []byte, after string) {
		clean := func(s string) string {
			return strings.Map(func(r rune) rune {
				if unicode.IsControl(r) {
					return ' '
				}
				return r
			}, s)
		}
		h.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Retry-After", clean(after))
			if strings.HasPrefix(r.URL.Path, "/token") {
				send(w, answer)
				return true
			}
			if r.Header.Get("Authorization") != "" {
				return false
			}
			w.Header().Set("WWW-Authenticate", strings.ReplaceAll(clean(challenge), "HUB", h.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		ctx, cancel := context.WithTimeout(context.Background(), fuzzPatience)
		defer cancel()
		_, err := s.Pull(ctx, h.host+"/app:1", &Auth{Username: testUser, Password: testPassword})
		if err != nil && (!hasClass(err) || errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), testPassword)) {
			t.Errorf("%v", err)
		}
		if n := len(h.seen("")); n > 100 {
			t.Errorf("%d requests", n)
		}
		settle(s)
		checkStore(t, s)
	})
}
