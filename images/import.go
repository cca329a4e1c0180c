package images

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archived is one image of an archive.
type archived struct {
	img   *resolved
	names []reference
	blobs map[string]string // diffID → the entry that holds the layer
}

// Import reads the images of an archive: docker save's format, or an OCI layout in a tar, plain or compressed.
// They get the names that the archive gives them, or ref, with the same meaning as in a pull; a digest that the
// archive does not have is computed, so that images by digest are found. A regular file is read in place,
// anything else is first written to the store's filesystem, since layers may come in any order.
func (s *Store) Import(ctx context.Context, r io.Reader, ref string) ([]Image, error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	defer done()
	a, err := s.openArchive(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", s.full(err))
	}
	defer a.close()
	found, err := a.images(ctx)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	if err := nameImages(found, ref); err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	var out []Image
	for _, one := range found {
		rec, err := s.addArchived(ctx, a, one)
		if err != nil {
			return nil, fmt.Errorf("import image %s: %w", one.names[0], s.full(err))
		}
		out = append(out, rec.image())
	}
	return out, nil
}

// nameImages settles what the images are called.
func nameImages(found []*archived, ref string) error {
	if ref == "" {
		for _, one := range found {
			if len(one.names) == 0 {
				return fmt.Errorf("%w: the archive does not say what image %s is called: give a name", ErrInvalid, one.img.id)
			}
		}
		return nil
	}
	r, err := parseReference(ref)
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("%w: the archive has %d images: one name does not do for them", ErrInvalid, len(found))
	}
	if r.Digest != "" && r.Digest != found[0].img.top {
		return fmt.Errorf("%w: the archive's image has digest %s", ErrDigest, found[0].img.top)
	}
	found[0].names = []reference{r}
	return nil
}

func (s *Store) addArchived(ctx context.Context, a *archive, one *archived) (*imageRecord, error) {
	var names []string
	for _, ref := range one.names {
		if ref.Digest == "" {
			names = append(names, ref.Tagged())
		}
		if d := ref.Digested(one.img.top); !slices.Contains(names, d) {
			names = append(names, d)
		}
	}
	rec, err := s.addImage(ctx, one.img, names, func(l layerWant) []origin {
		return []origin{{open: func(context.Context) (io.ReadCloser, error) {
			section, err := a.open(one.blobs[l.DiffID])
			if err != nil {
				return nil, err
			}
			return io.NopCloser(section), nil
		}}}
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("image imported", "image", one.names[0].String(), "id", rec.ID, "digest", one.img.top, "layers", len(one.img.layers))
	return rec, nil
}

// images finds out which of the two formats it is. Recent versions of docker write both into one archive: then
// the OCI layout counts, since it has the real manifest.
func (a *archive) images(ctx context.Context) ([]*archived, error) {
	docker, err := a.dockerManifest()
	if err != nil {
		return nil, err
	}
	if a.has("index.json") {
		return a.ociImages(ctx, docker)
	}
	if docker == nil {
		return nil, fmt.Errorf("%w: the archive is neither docker save's nor an OCI layout: it has no manifest.json and no index.json", ErrInvalid)
	}
	var out []*archived
	for _, d := range docker {
		one, err := a.dockerImage(d)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	return out, nil
}

// The annotations by which an OCI layout names its images: containerd's has the whole name, the specification's
// often only the tag.
const (
	annotationName = "io.containerd.image.name"
	annotationRef  = "org.opencontainers.image.ref.name"
)

func (a *archive) ociImages(ctx context.Context, docker []dockerEntry) ([]*archived, error) {
	raw, err := a.read("index.json")
	if err != nil {
		return nil, err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: index.json: %w", ErrInvalid, err)
	}
	entries := slices.DeleteFunc(slices.Clone(index.Manifests), func(d v1.Descriptor) bool { return annotatedName(d) == "" })
	if len(entries) == 0 {
		one, err := choosePlatform(index.Manifests)
		if err != nil {
			return nil, fmt.Errorf("index.json: %w", err)
		}
		entries = []v1.Descriptor{one}
	}
	byDigest := map[string]*archived{}
	var out []*archived
	for _, d := range entries {
		one := byDigest[d.Digest.String()]
		if one == nil {
			if one, err = a.ociImage(ctx, d); err != nil {
				return nil, err
			}
			byDigest[d.Digest.String()] = one
			out = append(out, one)
		}
		names := dockerNames(docker, one.img.id)
		if n := annotatedName(d); n != "" {
			names = []string{n}
		}
		for _, n := range names {
			ref, err := parseReference(n)
			if err != nil {
				return nil, err
			}
			one.names = append(one.names, ref)
		}
	}
	return out, nil
}

func annotatedName(d v1.Descriptor) string {
	if n := d.Annotations[annotationName]; n != "" {
		return n
	}
	if n := d.Annotations[annotationRef]; strings.ContainsAny(n, "/:") {
		return n
	}
	return ""
}

func (a *archive) ociImage(ctx context.Context, d v1.Descriptor) (*archived, error) {
	img, err := resolve(ctx, a, d.Digest.String())
	if err != nil {
		return nil, err
	}
	one := &archived{img: img, blobs: map[string]string{}}
	for _, l := range img.layers {
		one.blobs[l.DiffID] = blobPath(l.Digest)
		if !a.has(blobPath(l.Digest)) {
			return nil, fmt.Errorf("%w: the archive lacks layer %s", ErrInvalid, l.Digest)
		}
	}
	return one, nil
}

// dockerEntry is one image in docker save's manifest.json.
type dockerEntry struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (a *archive) dockerManifest() ([]dockerEntry, error) {
	if !a.has("manifest.json") {
		return nil, nil
	}
	raw, err := a.read("manifest.json")
	if err != nil {
		return nil, err
	}
	var out []dockerEntry
	if err := json.Unmarshal(raw, &out); err != nil || len(out) == 0 {
		return nil, fmt.Errorf("%w: manifest.json lists no image", ErrInvalid)
	}
	return out, nil
}

// dockerNames finds an image's names by its configuration, whose digest is in the configuration's file name.
func dockerNames(docker []dockerEntry, id string) []string {
	for _, d := range docker {
		if strings.Contains(d.Config, idHex(id)) {
			return d.RepoTags
		}
	}
	return nil
}

// dockerImage reads an image of docker save's format. That has no manifest, so one is made up of the layers as
// they are stored: the same archive always gives the same digest.
func (a *archive) dockerImage(d dockerEntry) (*archived, error) {
	config, err := a.read(d.Config)
	if err != nil {
		return nil, err
	}
	file, err := parseConfig(config)
	if err != nil {
		return nil, fmt.Errorf("%w: image configuration %s: %w", ErrInvalid, d.Config, err)
	}
	id, err := checkDigest(config, "")
	if err != nil {
		return nil, err
	}
	if len(file.RootFS.DiffIDs) != len(d.Layers) {
		return nil, fmt.Errorf("%w: image %s: %d layers, its configuration has %d", ErrInvalid, id, len(d.Layers), len(file.RootFS.DiffIDs))
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.DockerManifestSchema2,
		Config: v1.Descriptor{MediaType: types.DockerConfigJSON, Size: int64(len(config)), Digest: mustHash(id)}}
	one := &archived{img: &resolved{id: id, configBytes: config, config: file}, blobs: map[string]string{}}
	for i, path := range d.Layers {
		diffID := file.RootFS.DiffIDs[i]
		layer, err := a.describeLayer(path, diffID)
		if err != nil {
			return nil, err
		}
		m.Layers = append(m.Layers, layer)
		one.blobs[diffID.String()] = path
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("make manifest of image %s: %w", id, err)
	}
	if one.img.top, err = checkDigest(raw, ""); err != nil {
		return nil, err
	}
	one.img.manifest = one.img.top
	if err := errors.Join(one.img.checkSizes(), one.img.pairLayers(m.Layers)); err != nil {
		return nil, err
	}
	for _, tag := range d.RepoTags {
		ref, err := parseReference(tag)
		if err != nil {
			return nil, err
		}
		one.names = append(one.names, ref)
	}
	return one, nil
}

func mustHash(digest string) v1.Hash {
	algorithm, hex, _ := strings.Cut(digest, ":")
	return v1.Hash{Algorithm: algorithm, Hex: hex}
}

// describeLayer is the descriptor of a stored layer. A plain one has its diffID for a digest, by definition.
func (a *archive) describeLayer(path string, diffID v1.Hash) (v1.Descriptor, error) {
	section, err := a.open(path)
	if err != nil {
		return v1.Descriptor{}, err
	}
	magic, err := peek(bufio.NewReader(section))
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{Size: section.Size(), Digest: diffID, MediaType: types.DockerUncompressedLayer}
	switch compression(magic) {
	case compressedGzip:
		d.MediaType = types.DockerLayer
	case compressedZstd:
		d.MediaType = types.OCILayerZStd
	default:
		return d, nil
	}
	if section, err = a.open(path); err != nil {
		return v1.Descriptor{}, err
	}
	if d.Digest, _, err = v1.SHA256(section); err != nil {
		return v1.Descriptor{}, fmt.Errorf("read layer %s: %w", path, err)
	}
	return d, nil
}
