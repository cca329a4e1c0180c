package images

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/v1"

	"github.com/coracle-cri/coracle/e2e/crash"
)

const recordVersion = 1

// errNewer marks a record that a later version wrote: it is left where it is, and so is what it may refer to.
var errNewer = errors.New("record was written by a later version")

// layerRecord is layers/…/layer.json.
type layerRecord struct {
	Version int      `json:"version"`
	DiffID  string   `json:"diffID"`
	Bytes   uint64   `json:"bytes"`  // on disk, in whole blocks
	Inodes  uint64   `json:"inodes"` // files, directories and links
	Root    *dirMeta `json:"root,omitempty"`
	// OpaqueRoot: the layer hides everything beneath it. The overlay ignores an opaque mark on a layer's root, so
	// the layers beneath are left out of the mount instead.
	OpaqueRoot bool `json:"opaqueRoot,omitempty"`
	// The directories that no entry of the layer describes, sorted; those whose names JSON would bend are apart.
	Implied    []string  `json:"implied,omitempty"`
	ImpliedRaw [][]byte  `json:"impliedRaw,omitempty"`
	Notes      []note    `json:"notes,omitempty"`
	BootID     string    `json:"bootID"` // the boot in which it was written
	Synced     bool      `json:"synced"` // on stable storage; see sync.go
	Made       time.Time `json:"made"`
}

func (r *layerRecord) setImplied(names []string) {
	for _, name := range names {
		if utf8.ValidString(name) {
			r.Implied = append(r.Implied, name)
		} else {
			r.ImpliedRaw = append(r.ImpliedRaw, []byte(name))
		}
	}
}

func (r *layerRecord) impliedDirs() []string {
	names := slices.Clone(r.Implied)
	for _, raw := range r.ImpliedRaw {
		names = append(names, string(raw))
	}
	return names
}

// implies tells whether no entry of the layer describes dir. A layer may have many such directories.
func (r *layerRecord) implies(dir string) bool {
	_, found := slices.BinarySearch(r.Implied, dir)
	if !found {
		_, found = slices.BinarySearchFunc(r.ImpliedRaw, dir, func(raw []byte, dir string) int { return strings.Compare(string(raw), dir) })
	}
	return found
}

// dirMeta is what can be said of a directory beside its content.
type dirMeta struct {
	Mode  uint32 `json:"mode"` // permission bits with setuid, setgid and sticky
	UID   int    `json:"uid"`
	GID   int    `json:"gid"`
	MTime int64  `json:"mtime"` // Unix nanoseconds
}

// note is something that a layer asked for and did not get.
type note struct {
	What   string `json:"what"`
	Count  int    `json:"count"`
	Sample string `json:"sample"` // the first path that it happened to
}

// imageRecord is images/HEX.json. A record is never changed once it is in the index: it is replaced.
type imageRecord struct {
	Version     int               `json:"version"`
	ID          string            `json:"id"`
	Tags        map[string]int64  `json:"tags"` // canonical name → when it came to point here, Unix nanoseconds
	Digests     []string          `json:"digests"`
	Layers      []string          `json:"layers"` // diffIDs, lowest first
	Size        uint64            `json:"size"`
	Config      []byte            `json:"config"` // verbatim: its digest is the id
	Manifest    string            `json:"manifest"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Root        dirMeta           `json:"root"`
	Fix         bool              `json:"fix"` // there is a fix/HEX
	Pulled      time.Time         `json:"pulled"`

	file *v1.ConfigFile // Config, parsed
}

// rootfsRecord is rootfs/ID/rootfs.json and volumes/ID/rootfs.json.
type rootfsRecord struct {
	Version int      `json:"version"`
	Image   string   `json:"image"`
	Layers  []string `json:"layers"`
	Fix     bool     `json:"fix"`
	Driver  string   `json:"driver"`

	unknown bool // it could not be read: it may need anything
}

func (r *layerRecord) version() int  { return r.Version }
func (r *imageRecord) version() int  { return r.Version }
func (r *rootfsRecord) version() int { return r.Version }

type versioned interface{ version() int }

// readRecord reads a JSON record of this version.
func readRecord(path string, into versioned) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("read record %s: %w", path, err)
	}
	if v := into.version(); v > recordVersion {
		return fmt.Errorf("read record %s: version %d: %w", path, v, errNewer)
	} else if v != recordVersion {
		return fmt.Errorf("read record %s: version %d: want %d", path, v, recordVersion)
	}
	return nil
}

// writeRecord replaces path by the record: a temporary file, fsync, rename, fsync of the directory. The temporary file
// is in tmp and not beside path: a layer may be thrown away while its record is written, and whoever empties its
// directory must not meet a new file there.
func (s *Store) writeRecord(path string, record any) error {
	return s.writeRecords([]target{{path, record}})
}

// target is a record and where it goes.
type target struct {
	path   string
	record any
}

// writeRecords replaces several: none of them is replaced before there was room for all.
func (s *Store) writeRecords(all []target) error {
	var u undo
	temps := make([]string, len(all))
	for i, t := range all {
		temp, err := s.stageRecord(t)
		if err != nil {
			return u.run(err)
		}
		u = append(u, func() error { return os.Remove(temp) })
		temps[i] = temp
	}
	for i, t := range all {
		if err := os.Rename(temps[i], t.path); err != nil {
			return u[i:].run(fmt.Errorf("write record: %w", err))
		}
		crash.Point("images/record-replaced")
	}
	for _, dir := range dirsOf(all) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

func dirsOf(all []target) []string {
	var dirs []string
	for _, t := range all {
		if dir := filepath.Dir(t.path); !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// stageRecord writes a record to a temporary file, and leaves none where it fails.
func (s *Store) stageRecord(t target) (temp string, err error) {
	raw, err := json.Marshal(t.record)
	if err != nil {
		return "", fmt.Errorf("encode record %s: %w", t.path, err)
	}
	f, err := os.CreateTemp(s.path("tmp"), "record-*")
	if err != nil {
		return "", fmt.Errorf("write record: %w", err)
	}
	u := undo{func() error { return os.Remove(f.Name()) }}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return "", u.run(fmt.Errorf("write record %s: %w", t.path, err))
	}
	crash.Point("images/record-written")
	return f.Name(), nil
}

// syncDir makes renames and removals in dir durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// dirName is a digest as a file name.
func dirName(digest string) string { return strings.ReplaceAll(digest, ":", "-") }

func idHex(id string) string { return strings.TrimPrefix(id, "sha256:") }

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.cfg.Root}, elem...)...)
}

func (s *Store) layerDir(diffID string) string { return s.path("layers", dirName(diffID)) }
func (s *Store) imageFile(id string) string    { return s.path("images", idHex(id)+".json") }
func (s *Store) fixDir(id string) string       { return s.path("fix", idHex(id)) }

// tempDir makes an empty directory in tmp, where an interrupted piece of work is found and removed.
func (s *Store) tempDir(prefix string) (string, error) {
	dir := s.path("tmp", prefix+"-"+rand.Text())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("make temporary directory: %w", err)
	}
	crash.Point("images/temporary-made")
	return dir, nil
}

// discard takes path out of the store at once, and then removes it. A path that is not there is no error.
func (s *Store) discard(path string) error {
	trash, err := s.trash(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	crash.Point("images/discarded")
	if err := s.removeTrash(trash); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	crash.Point("images/discard-removed")
	return nil
}

func (r *imageRecord) clone() *imageRecord {
	c := *r
	c.Tags = map[string]int64{}
	for k, v := range r.Tags {
		c.Tags[k] = v
	}
	c.Digests = slices.Clone(r.Digests)
	return &c
}
