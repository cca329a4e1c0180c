package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// maxIndexDepth bounds indexes of indexes.
const maxIndexDepth = 3

var acceptManifests = strings.Join([]string{
	string(types.OCIManifestSchema1), string(types.OCIImageIndex),
	string(types.DockerManifestSchema2), string(types.DockerManifestList),
}, ", ")

// resolved is an image as a manifest describes it, with nothing fetched but documents.
type resolved struct {
	top         string // digest of what the reference led to: an index or the manifest
	manifest    string // digest of the image's own manifest
	configBytes []byte
	config      *v1.ConfigFile
	id          string
	layers      []layerWant
	annotations map[string]string
}

// documents gives manifests and configurations by digest: a registry, or an archive. A manifest may also be asked
// for by tag.
type documents interface {
	// document returns the bytes and, where it is known, the media type. kind is "manifests" or "blobs".
	document(ctx context.Context, kind, id string) (body []byte, mediaType string, err error)
}

func (r *remote) document(ctx context.Context, kind, id string) ([]byte, string, error) {
	accept := ""
	if kind == "manifests" {
		accept = acceptManifests
	}
	return r.get(ctx, kind, id, accept)
}

// resolve follows a tag or digest through indexes to the image for this machine, and checks every digest on
// the way.
func resolve(ctx context.Context, docs documents, identifier string) (*resolved, error) {
	out := &resolved{}
	for depth := 0; ; depth++ {
		raw, mediaType, err := docs.document(ctx, "manifests", identifier)
		if err != nil {
			return nil, err
		}
		digest, err := checkDigest(raw, identifier)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", identifier, err)
		}
		if out.top == "" {
			out.top = digest
		}
		kind, err := manifestKind(raw, mediaType)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", identifier, err)
		}
		if kind == kindImage {
			out.manifest = digest
			return out, out.read(ctx, docs, raw)
		}
		if depth == maxIndexDepth {
			return nil, fmt.Errorf("%w: manifest %s: more than %d indexes in each other", ErrRefused, identifier, maxIndexDepth)
		}
		index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%w: index %s: %w", ErrRefused, identifier, err)
		}
		next, err := choosePlatform(index.Manifests)
		if err != nil {
			return nil, fmt.Errorf("index %s: %w", identifier, err)
		}
		identifier = next.Digest.String()
	}
}

const (
	kindImage = "image"
	kindIndex = "index"
)

// manifestKind tells what a document is by what it says itself, before what the server says: servers of plain
// files send any Content-Type.
func manifestKind(raw []byte, mediaType string) (string, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("%w: it is not JSON: %w", ErrRefused, err)
	}
	if m.MediaType == "" {
		m.MediaType = types.MediaType(mediaType)
	}
	switch {
	case m.SchemaVersion == 1:
		return "", fmt.Errorf("%w: it has the old schema 1: push the image again with a current tool", ErrRefused)
	case m.MediaType.IsIndex() && m.Config == nil:
		return kindIndex, nil
	case m.MediaType.IsImage() && m.Manifests == nil:
		return kindImage, nil
	case m.Config != nil && m.Manifests == nil:
		return kindImage, nil
	case m.Manifests != nil && m.Config == nil:
		return kindIndex, nil
	}
	return "", fmt.Errorf("%w: media type %q is neither an image nor an index", ErrRefused, m.MediaType)
}

// checkDigest returns the digest of raw, and compares it with the identifier where that is one.
func checkDigest(raw []byte, identifier string) (string, error) {
	want := identifier
	if !strings.Contains(identifier, ":") {
		want = "sha256:" + strings.Repeat("0", 64)
	}
	h, err := hasher(want)
	if err != nil {
		return "", err
	}
	h.Write(raw)
	got := digestOf(want, h)
	if strings.Contains(identifier, ":") && got != identifier {
		return "", fmt.Errorf("%w: what came has digest %s", ErrDigest, got)
	}
	return got, nil
}

// read reads the image's manifest and fetches its configuration.
func (r *resolved) read(ctx context.Context, docs documents, raw []byte) error {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("%w: manifest %s: %w", ErrRefused, r.manifest, err)
	}
	switch m.Config.MediaType {
	case types.OCIConfigJSON, types.DockerConfigJSON, "":
	default:
		return fmt.Errorf("%w: manifest %s is no container image: its configuration is %q", ErrRefused, r.manifest, m.Config.MediaType)
	}
	if r.configBytes, _, err = docs.document(ctx, "blobs", m.Config.Digest.String()); err != nil {
		return err
	}
	if _, err := checkDigest(r.configBytes, m.Config.Digest.String()); err != nil {
		return fmt.Errorf("image configuration %s: %w", m.Config.Digest, err)
	}
	if m.Config.Digest.Algorithm != "sha256" {
		return fmt.Errorf("%w: image configuration %s: want a sha256 digest", ErrRefused, m.Config.Digest)
	}
	r.id, r.annotations = m.Config.Digest.String(), m.Annotations
	if r.config, err = parseConfig(r.configBytes); err != nil {
		return fmt.Errorf("%w: image configuration %s: %w", ErrRefused, r.id, err)
	}
	if err := r.checkSizes(); err != nil {
		return err
	}
	return r.pairLayers(m.Layers)
}

// parseConfig reads an image's configuration, which must be one JSON document and no more: it is kept and shown as it came.
func parseConfig(raw []byte) (*v1.ConfigFile, error) {
	if !json.Valid(raw) {
		return nil, errors.New("it is not JSON")
	}
	return v1.ParseConfigFile(bytes.NewReader(raw))
}

// What a list of images tells of each, and one image must not make the list too long for gRPC.
const (
	maxAnnotations = 256 << 10 // bytes of keys and values
	maxUser        = 1 << 10
)

func (r *resolved) checkSizes() error {
	size := 0
	for k, v := range r.annotations {
		size += len(k) + len(v)
	}
	if size > maxAnnotations {
		return fmt.Errorf("%w: image %s: annotations of %d bytes, more than %d", ErrRefused, r.id, size, maxAnnotations)
	}
	if n := len(r.config.Config.User); n > maxUser {
		return fmt.Errorf("%w: image %s: the name of its user has %d bytes, more than %d", ErrRefused, r.id, n, maxUser)
	}
	return nil
}

// maxLayers is overlayfs's limit of lower directories (OVL_MAX_STACK), less one for fix/HEX.
const maxLayers = 499

func (r *resolved) pairLayers(layers []v1.Descriptor) error {
	diffIDs := r.config.RootFS.DiffIDs
	if len(diffIDs) != len(layers) {
		return fmt.Errorf("%w: image %s: manifest has %d layers, configuration %d", ErrRefused, r.id, len(layers), len(diffIDs))
	}
	if len(layers) > maxLayers {
		return fmt.Errorf("%w: image %s: %d layers, an overlay takes %d", ErrRefused, r.id, len(layers), maxLayers)
	}
	for i, l := range layers {
		want := layerWant{DiffID: diffIDs[i].String(), Digest: l.Digest.String(), Size: l.Size}
		for _, d := range []string{want.DiffID, want.Digest} {
			if _, err := hasher(d); err != nil {
				return fmt.Errorf("image %s: layer %d: %w", r.id, i+1, err)
			}
		}
		if l.Size < 0 {
			return fmt.Errorf("%w: image %s: layer %d has size %d", ErrRefused, r.id, i+1, l.Size)
		}
		r.layers = append(r.layers, want)
	}
	return nil
}
