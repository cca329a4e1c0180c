package images

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// recover reads what is on disk into the index and returns the paths that belong to nothing: the background
// goroutine removes them, so that a large half-done layer does not delay the start.
func (s *Store) recover() (stale []string, err error) {
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	mounted, all := s.mountedLayers()
	for _, e := range entries {
		path := s.path("tmp", e.Name())
		if name, kept := keptName(e.Name()); kept && (all || mounted[name]) {
			s.hasKept.Store(true)
			continue
		}
		// A daemon that was killed while it tried the drivers (mounter.probe) has left its mount: mounts belong to the
		// namespace, not to the process.
		if strings.HasPrefix(e.Name(), "probe-") {
			if err := unmount(filepath.Join(path, "merged")); err != nil {
				return nil, fmt.Errorf("open image store: %w", err)
			}
		}
		stale = append(stale, path)
	}
	s.keep = func(name string) bool { return all || mounted[name] }
	newer := false
	for _, step := range []func(*bool) ([]string, error){s.loadLayers, s.loadImages, s.loadMounts} {
		paths, err := step(&newer)
		if err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
		stale = append(stale, paths...)
	}
	if newer {
		// A record that this version cannot read may need any layer.
		return stale, nil
	}
	trash, err := s.takeUnused()
	return append(stale, trash...), err
}

// setAside moves a record that cannot be read out of the way, and says where.
func (s *Store) setAside(path string, why error) {
	to := s.path("corrupt", filepath.Base(filepath.Dir(path))+"-"+filepath.Base(path)+"-"+rand.Text()[:8])
	if err := os.Rename(path, to); err != nil {
		s.log.Error("corrupt record cannot be set aside", "path", path, "error", errors.Join(why, err))
		return
	}
	s.log.Error("corrupt record set aside", "path", path, "moved", to, "error", why)
}

// keptPrefix begins the name, in tmp, of a layer that cannot be served any more and that a container still sees.
const keptPrefix = "kept-"

func keptName(name string) (layer string, kept bool) {
	rest, kept := strings.CutPrefix(name, keptPrefix)
	layer, _, _ = strings.Cut(rest, ".")
	return layer, kept
}

// putAside takes a layer out of the store without a change to its files, which are the lower part of some container's root:
// overlayfs holds them by themselves, not by their path. They go with that container.
func (s *Store) putAside(dir string, why error) error {
	to := s.path("tmp", keptPrefix+filepath.Base(dir)+"."+rand.Text())
	if err := os.Rename(dir, to); err != nil {
		return fmt.Errorf("put layer aside: %w", err)
	}
	s.hasKept.Store(true)
	s.log.Error("layer is not served any more; containers that have it keep it", "layer", filepath.Base(dir), "moved", to, "error", why)
	return nil
}

// dropKept removes what was put aside for a container that is gone.
func (s *Store) dropKept() error {
	if !s.hasKept.Load() {
		return nil
	}
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return fmt.Errorf("list layers that were put aside: %w", err)
	}
	left := false
	for _, e := range entries {
		name, kept := keptName(e.Name())
		if kept && s.index.mountNeeds(name) {
			left = true
		} else if kept {
			err = errors.Join(err, os.RemoveAll(s.path("tmp", e.Name())))
		}
	}
	if !left {
		s.hasKept.Store(false)
	}
	return err
}

// mountedLayers are the directories' names of the layers that root filesystems and volumes have, or all where one of
// those does not tell.
func (s *Store) mountedLayers() (names map[string]bool, all bool) {
	names = map[string]bool{}
	for _, kind := range []string{kindRootfs, kindVolume} {
		entries, err := os.ReadDir(s.path(kind))
		if err != nil {
			return nil, true
		}
		for _, e := range entries {
			r := &rootfsRecord{}
			if readRecord(s.path(kind, e.Name(), "rootfs.json"), r) != nil {
				return nil, true
			}
			for _, d := range r.Layers {
				names[dirName(d)] = true
			}
		}
	}
	return names, false
}

func (s *Store) loadLayers(newer *bool) (stale []string, err error) {
	entries, err := os.ReadDir(s.path("layers"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		dir := s.path("layers", e.Name())
		r := &layerRecord{}
		err := readRecord(filepath.Join(dir, "layer.json"), r)
		if errors.Is(err, errNewer) {
			*newer = true
			s.log.Error("layer is not served", "error", err)
			continue
		}
		if err == nil && dirName(r.DiffID) != e.Name() {
			err = fmt.Errorf("read record of layer %s: it is that of %s", dir, r.DiffID)
		}
		if err == nil && !r.Synced && r.BootID != s.boot {
			err = fmt.Errorf("layer %s was not yet on disk when the machine went down", r.DiffID)
		}
		if err != nil {
			if s.keep(e.Name()) {
				if perr := s.putAside(dir, err); noRoom(perr) {
					s.log.Error("layer is not served, and stays where it is for want of room", "path", dir, "error", err)
				} else if perr != nil {
					return nil, perr
				}
				continue
			}
			s.log.Warn("layer dropped", "layer", e.Name(), "error", err)
			trash, err := s.trash(dir)
			if err != nil {
				return nil, err
			}
			stale = append(stale, trash)
			continue
		}
		s.index.layers[r.DiffID] = r
	}
	return stale, nil
}

func (s *Store) loadImages(newer *bool) (stale []string, err error) {
	entries, err := os.ReadDir(s.path("images"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := s.path("images", e.Name())
		if !strings.HasSuffix(e.Name(), ".json") { // a record that was being written
			if err := os.RemoveAll(path); err != nil {
				return nil, err
			}
			continue
		}
		r, err := readImage(path)
		switch {
		case errors.Is(err, errNewer):
			*newer = true
			s.log.Error("image is not served", "error", err)
		case err != nil:
			s.setAside(path, err)
		default:
			if missing := s.missing(r.Layers); len(missing) > 0 {
				s.log.Warn("image dropped: pull it again", "id", r.ID, "names", r.image().RepoTags, "missingLayers", missing)
				trash, err := s.trash(path)
				if err != nil {
					return nil, err
				}
				stale = append(stale, trash)
				continue
			}
			s.takeYounger(r)
		}
	}
	return stale, nil
}

// missing returns which of the layers are not in the store.
func (s *Store) missing(diffIDs []string) []string {
	return slices.DeleteFunc(slices.Clone(diffIDs), func(d string) bool { return s.index.layer(d) != nil })
}

// takeYounger publishes r. A tag that two records claim belongs to the one that got it last: a crash came
// between the two writes of commitImage, and the next change of the older record writes the outcome.
func (s *Store) takeYounger(r *imageRecord) {
	for tag, at := range r.Tags {
		other := s.index.image(s.index.names[tag])
		if other == nil {
			continue
		}
		if other.Tags[tag] >= at {
			delete(r.Tags, tag)
			continue
		}
		loser := other.clone()
		delete(loser.Tags, tag)
		s.index.putImage(loser)
	}
	s.index.putImage(r)
}

// readImage reads and checks an image record: its configuration must still have the digest that is its id.
func readImage(path string) (*imageRecord, error) {
	r := &imageRecord{}
	if err := readRecord(path, r); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(r.Config)
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != r.ID || idHex(r.ID)+".json" != filepath.Base(path) {
		return nil, fmt.Errorf("read record %s: configuration has digest %s", path, got)
	}
	var err error
	if r.file, err = v1.ParseConfigFile(strings.NewReader(string(r.Config))); err != nil {
		return nil, fmt.Errorf("read record %s: %w", path, err)
	}
	if r.Tags == nil {
		r.Tags = map[string]int64{}
	}
	return r, nil
}

// loadMounts reads the records of root filesystems and volumes. Their layers are needed whether they are
// mounted or not: the containers may be running under another process.
func (s *Store) loadMounts(newer *bool) (stale []string, err error) {
	for _, kind := range []string{kindRootfs, kindVolume} {
		entries, err := os.ReadDir(s.path(kind))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			dir := s.path(kind, e.Name())
			r := &rootfsRecord{}
			err := readRecord(filepath.Join(dir, "rootfs.json"), r)
			if err != nil {
				if errors.Is(err, errNewer) {
					s.log.Error("root filesystem stays until its container is gone", "error", err)
				} else {
					s.setAside(filepath.Join(dir, "rootfs.json"), err)
				}
				// What the record says cannot be known: its layers must stay until the owner is gone.
				*newer = true
				r = &rootfsRecord{Version: recordVersion, unknown: true}
			}
			s.index.mounts[kind+"/"+e.Name()] = r
			if r.Driver != driverCopy && !isMountPoint(filepath.Join(dir, "merged")) {
				// The node was restarted, or a crash came between record and mount: Reconcile decides.
				s.log.Info("root filesystem is not mounted", "path", dir)
			}
			if lost := s.missing(r.Layers); len(lost) > 0 {
				s.log.Warn("root filesystem lost layers", "path", dir, "layers", lost)
			}
		}
	}
	return stale, nil
}
