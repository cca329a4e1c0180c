package images

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Pull fetches an image and returns it when it is whole and can be mounted. It always asks the registry, so that
// a tag that moved is noticed and credentials are checked, but fetches only layers that are not here. Pulls of one
// reference with the same credentials share the work; a pull that fails or is cancelled leaves only whole layers,
// for as long as another pull needs them. It takes as long as it makes progress (see patience); ctx bounds it.
func (s *Store) Pull(ctx context.Context, name string, auth *Auth) (Image, error) {
	ref, err := parseReference(name)
	if err != nil {
		return Image{}, fmt.Errorf("pull image: %w", err)
	}
	if auth != nil {
		if _, err := auth.config(); err != nil {
			return Image{}, fmt.Errorf("pull image %s: %w", ref, err)
		}
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return Image{}, fmt.Errorf("pull image %s: %w", ref, err)
	}
	defer done()
	rec, _, err := s.fetch.pulls.do(ctx, flightKey(ref, auth), func(ctx context.Context) (*imageRecord, error) {
		return s.pull(ctx, ref, auth)
	})
	if err != nil {
		return Image{}, fmt.Errorf("pull image %s: %w", ref, s.full(err))
	}
	return rec.image(), nil
}

// flightKey tells pulls apart by what they ask for and with whose credentials: nobody gets an image on the
// strength of another's.
func flightKey(ref reference, auth *Auth) string {
	if auth == nil {
		auth = &Auth{}
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", *auth))
	return ref.String() + " " + string(sum[:])
}

func (s *Store) pull(ctx context.Context, ref reference, auth *Auth) (*imageRecord, error) {
	start := time.Now()
	at, err := s.cfg.endpoints(ref)
	if err != nil {
		return nil, err
	}
	src := &source{store: s, ref: ref, auth: auth, endpoints: at}
	for range at {
		src.patience = append(src.patience, &patience{waits: s.cfg.waits})
	}
	img, err := src.resolve(ctx)
	if err != nil {
		return nil, err
	}
	names := []string{ref.Digested(img.top)}
	if ref.Digest == "" {
		names = append(names, ref.Tagged())
	}
	rec, err := s.addImage(ctx, img, names, src.places)
	if err != nil {
		return nil, err
	}
	s.log.Info("image pulled", "image", ref.String(), "id", rec.ID, "digest", img.top, "from", src.from().String(),
		"layers", len(img.layers), "took", time.Since(start).Round(time.Millisecond))
	return rec, nil
}

// addImage brings in an image's layers and then writes its record. names are the canonical names by tag and by
// digest that it has from now on. places tells where a layer's blob can be had.
func (s *Store) addImage(ctx context.Context, img *resolved, names []string, places func(layerWant) []origin) (*imageRecord, error) {
	diffIDs := make([]string, 0, len(img.layers))
	for _, l := range img.layers {
		diffIDs = append(diffIDs, l.DiffID)
	}
	rec, err := s.addPinned(ctx, img, diffIDs, names, places)
	if err != nil {
		// Layers that came in before the failure are whole, but nobody needs them.
		return nil, errors.Join(err, s.collect())
	}
	return rec, nil
}

func (s *Store) addPinned(ctx context.Context, img *resolved, diffIDs, names []string, places func(layerWant) []origin) (*imageRecord, error) {
	defer s.index.pin(append([]string{fixPin(img.id)}, diffIDs...))()
	if err := s.addLayers(ctx, img.layers, places); err != nil {
		return nil, err
	}
	layers, err := s.layersOf(diffIDs)
	if err != nil {
		return nil, err
	}
	rec := &imageRecord{Version: recordVersion, ID: img.id, Tags: map[string]int64{}, Layers: diffIDs, Config: img.configBytes,
		Manifest: img.manifest, Annotations: img.annotations, Root: rootMeta(layers), Pulled: now(), file: img.config}
	if rec.Fix, err = s.makeFix(ctx, img.id, layers); err != nil {
		return nil, err
	}
	rec.Size = uint64(len(img.configBytes))
	for _, d := range slices.Compact(slices.Sorted(slices.Values(diffIDs))) {
		rec.Size += s.index.layer(d).Bytes
	}
	for _, n := range names {
		if isDigested(n) {
			rec.Digests = append(rec.Digests, n)
		} else {
			rec.Tags[n] = rec.Pulled.UnixNano()
		}
	}
	return s.commitImage(rec, names)
}

// addLayers brings in the layers, the largest first: it is what the whole waits for. The first failure ends the
// others.
func (s *Store) addLayers(ctx context.Context, layers []layerWant, places func(layerWant) []origin) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	order := slices.Clone(layers)
	slices.SortStableFunc(order, func(a, b layerWant) int { return cmp.Compare(b.Size, a.Size) })
	order = slices.CompactFunc(order, func(a, b layerWant) bool { return a.DiffID == b.DiffID })
	within, err := s.roomFor(order)
	if err != nil {
		return err
	}
	results := make(chan error, len(order))
	for _, l := range order {
		go func() {
			err := guarded(s.log, func() error { return s.ensureLayer(ctx, l, within, places(l)) })
			if err != nil {
				cancel()
			}
			results <- err
		}()
	}
	var first error
	for range order {
		err := <-results
		if err != nil && (first == nil || errors.Is(first, context.Canceled)) {
			first = err
		}
	}
	return first
}

// source is the places that one pull may use, connected as they are needed.
type source struct {
	store     *Store
	ref       reference
	auth      *Auth
	endpoints []endpoint
	patience  []*patience // with each of them
	used      int         // index of the endpoint that gave the manifest
	remote    *remote
}

func (c *source) from() endpoint { return c.endpoints[c.used] }

func (c *source) connect(ctx context.Context, i int) (*remote, error) {
	retries := registryRetries
	if i < len(c.endpoints)-1 {
		retries = mirrorRetries
	}
	return c.store.connect(ctx, c.endpoints[i], c.auth, retries, c.patience[i])
}

// resolve asks the endpoints in order. The error is of the class of the last, which is the registry itself.
func (c *source) resolve(ctx context.Context) (*resolved, error) {
	var errs []error
	for i := range c.endpoints {
		r, err := c.connect(ctx, i)
		if err == nil {
			var img *resolved
			if img, err = resolve(ctx, r, c.ref.Identifier()); err == nil {
				c.used, c.remote = i, r
				return img, nil
			}
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if i < len(c.endpoints)-1 {
			c.store.log.Warn("mirror does not serve image", "image", c.ref.String(), "mirror", c.endpoints[i].host, "error", err)
		}
		errs = append(errs, err)
	}
	last := errs[len(errs)-1]
	for _, err := range errs[:len(errs)-1] {
		last = fmt.Errorf("%w; before that: %s", last, err.Error())
	}
	return nil, last
}

// places lists who may have a layer's blob: whoever had the manifest, then those after.
func (c *source) places(l layerWant) []origin {
	var out []origin
	for i := c.used; i < len(c.endpoints); i++ {
		out = append(out, origin{host: c.endpoints[i].host, open: func(ctx context.Context) (io.ReadCloser, error) {
			r := c.remote
			if i != c.used {
				var err error
				if r, err = c.connect(ctx, i); err != nil {
					return nil, err
				}
			}
			return r.blob(ctx, l.Digest, l.Size)
		}})
	}
	return out
}

func isDigested(name string) bool { return slices.Contains([]byte(name), '@') }
