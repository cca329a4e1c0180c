package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// dockerArchive is what docker save of old writes: plain layers, the second as a link.
func dockerArchive(t *testing.T, img v1.Image, tags ...string) []byte {
	t.Helper()
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d := dockerEntry{Config: idHex(mustConfig(t, img)) + ".json", RepoTags: tags}
	entries := []entry{}
	for i, l := range layers {
		rc, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		at := string(rune('a'+i)) + "/layer.tar"
		entries = append(entries, file("blobs/"+at, string(raw)), symlink(at, "../blobs/"+at))
		d.Layers = append(d.Layers, at)
	}
	manifest, err := json.Marshal([]dockerEntry{d})
	if err != nil {
		t.Fatal(err)
	}
	return archiveOf(t, append(entries, file(d.Config, string(config)), file("manifest.json", string(manifest)))...)
}

// ociArchive is an OCI layout in a tar.
func ociArchive(t *testing.T, annotations map[string]string, imgs ...v1.Image) []byte {
	t.Helper()
	dir := t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range imgs {
		if err := l.AppendImage(img, layout.WithAnnotations(annotations)); err != nil {
			t.Fatal(err)
		}
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestImport(t *testing.T) {
	img := imageOf(t, gzipLayer(t, file("a", "1")), layerOf(t, compressedZstd, file("b", "2")))
	id, digest := mustConfig(t, img), digestOfImage(t, img)
	crane := func() []byte {
		var buf bytes.Buffer
		tag, err := name.NewTag("example.com/app:crane")
		if err != nil {
			t.Fatal(err)
		}
		if err := tarball.Write(tag, img, &buf); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}()
	var squeezed bytes.Buffer
	zw := gzip.NewWriter(&squeezed)
	if _, err := zw.Write(dockerArchive(t, img, "app:1")); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		raw    []byte
		ref    string
		tags   []string
		digest string // "" = computed
	}{
		"docker save":             {dockerArchive(t, img, "app:1", "localhost/team/app:2"), "", []string{"docker.io/library/app:1", "localhost/team/app:2"}, ""},
		"docker save, compressed": {squeezed.Bytes(), "", []string{"docker.io/library/app:1"}, ""},
		"docker save, renamed":    {dockerArchive(t, img, "app:1"), "example.com/x/y:z", []string{"example.com/x/y:z"}, ""},
		"crane":                   {crane, "", []string{"example.com/app:crane"}, ""},
		"oci, full name":          {ociArchive(t, map[string]string{annotationName: "docker.io/library/app:1", annotationRef: "1"}, img), "", []string{"docker.io/library/app:1"}, digest},
		"oci, name in ref.name":   {ociArchive(t, map[string]string{annotationRef: "localhost/app:1"}, img), "", []string{"localhost/app:1"}, digest},
		"oci, named by us":        {ociArchive(t, nil, img), "app", []string{"docker.io/library/app:latest"}, digest},
	} {
		for _, regular := range []bool{true, false} {
			t.Run(what, func(t *testing.T) {
				s := openStore(t, Config{})
				var r io.Reader = bytes.NewReader(c.raw)
				if regular {
					path := filepath.Join(t.TempDir(), "archive.tar")
					if err := os.WriteFile(path, c.raw, 0o600); err != nil {
						t.Fatal(err)
					}
					f, err := os.Open(path)
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					r = f
				}
				got, err := s.Import(context.Background(), r, c.ref)
				if err != nil {
					t.Fatal(err)
				}
				if len(got) != 1 || got[0].ID != id || !slices.Equal(got[0].RepoTags, c.tags) || len(got[0].RepoDigests) == 0 {
					t.Fatalf("got %+v", got)
				}
				for _, d := range got[0].RepoDigests {
					if c.digest != "" && !strings.HasSuffix(d, "@"+c.digest) {
						t.Errorf("digest %s, want %s", d, c.digest)
					}
					if again, err := s.Get(d); err != nil || again.ID != id {
						t.Errorf("Get(%s): %v", d, err)
					}
				}
				root := mount(t, s, "c", c.tags[0])
				if read(t, root+"/a") != "1" || read(t, root+"/b") != "2" {
					t.Error("content")
				}
			})
		}
	}
}

func TestImportRefuses(t *testing.T) {
	img := imageOf(t, gzipLayer(t, file("a", "1")))
	two := imageOf(t, gzipLayer(t, file("a", "2")))
	good := dockerArchive(t, img, "app:1")
	for what, c := range map[string]struct {
		raw  []byte
		ref  string
		want error
	}{
		"nothing":             {nil, "", ErrInvalid},
		"no archive":          {[]byte(strings.Repeat("hello", 1000)), "", ErrInvalid},
		"another archive":     {archiveOf(t, file("README", "")), "", ErrInvalid},
		"no name":             {dockerArchive(t, img), "", ErrInvalid},
		"oci without name":    {ociArchive(t, map[string]string{annotationRef: "latest"}, img), "", ErrInvalid},
		"one name for two":    {ociArchive(t, map[string]string{annotationName: "x/y:1"}, img, two), "app", ErrInvalid},
		"another digest":      {good, "app@" + sum([]byte("x")), ErrDigest},
		"bad name":            {good, "UPPER", ErrInvalid},
		"spoiled layer":       {bytes.Replace(good, []byte("1\x00\x00"), []byte("9\x00\x00"), 1), "", ErrDigest},
		"layer links outside": {archiveOf(t, symlink("a/layer.tar", "/etc/passwd"), file("c.json", string(mustRaw(t, img))), file("manifest.json", `[{"Config":"c.json","RepoTags":["a:1"],"Layers":["a/layer.tar"]}]`)), "", ErrInvalid},
	} {
		s := openStore(t, Config{})
		if _, err := s.Import(context.Background(), bytes.NewReader(c.raw), c.ref); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		if len(s.index.layers)+len(s.index.images) != 0 {
			t.Errorf("%s: something is left", what)
		}
	}
}

func mustRaw(t *testing.T, img v1.Image) []byte {
	t.Helper()
	raw, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
