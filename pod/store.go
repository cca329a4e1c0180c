package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// recordVersion is the version of every record below. A reader refuses what it does not know.
const recordVersion = 1

// store is the records on disk, one JSON file an object. This process is their only writer. Specs live in the
// data directory and outlive the machine's boot; statuses live in the runtime directory, as what they tell of, and those
// of containers are also kept in the history.
type store struct {
	data    string
	run     string
	log     *slog.Logger
	history *history
}

// openStore makes the directories that are missing. Nobody else may be at work in them.
func openStore(data, run string, log *slog.Logger) (*store, error) {
	s := &store{data: data, run: run, log: log, history: newHistory(filepath.Join(data, "history"), log)}
	for _, dir := range []string{filepath.Join(data, "pods"), filepath.Join(data, "containers"), s.history.dir,
		filepath.Join(run, "pods"), filepath.Join(run, "containers")} {
		if err := s.makeDir(dir); err != nil {
			return nil, err
		}
	}
	if err := s.history.sweepHalf(); err != nil {
		log.Warn("what is in the way of the history stays", "error", err)
	}
	return s, nil
}

// makeDir sets aside what is in the place of a directory of records and is none.
func (s *store) makeDir(dir string) error {
	if info, err := os.Lstat(dir); err == nil && !info.IsDir() {
		s.setAside(dir, errors.New("it is no directory"))
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	return nil
}

func (s *store) podSpecPath(id string) string { return filepath.Join(s.data, "pods", id+".json") }
func (s *store) containerSpecPath(id string) string {
	return filepath.Join(s.data, "containers", id+".json")
}
func (s *store) podDir(id string) string       { return filepath.Join(s.run, "pods", id) }
func (s *store) containerDir(id string) string { return filepath.Join(s.run, "containers", id) }

func statusPath(dir string) string { return filepath.Join(dir, "status.json") }

type envelope[T any] struct {
	Version int `json:"version"`
	Record  T   `json:"record"`
}

// saveSpec replaces the file at path: temp, fsync, rename. A spec outlives the machine's crash, whole or not at all.
func saveSpec[T any](path string, record T) error { return replace(path, record, true) }

// saveStatus replaces the file at path: temp, rename. It is not fsynced: a status tells of this life of the node, the
// page cache outlives a daemon that is killed, and when the kernel dies the node has died with it.
func saveStatus[T any](path string, record T) error { return replace(path, record, false) }

const tempSuffix = ".tmp"

func replace[T any](path string, record T, synced bool) error {
	raw, err := json.Marshal(envelope[T]{recordVersion, record})
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	tmp := path + tempSuffix
	if err := write(tmp, raw, synced); err != nil {
		return errors.Join(err, remove(tmp))
	}
	crash.Point("pod/record-written")
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("replace record: %w", err)
	}
	crash.Point("pod/record-replaced")
	return nil
}

func write(path string, raw []byte, synced bool) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	_, err = f.Write(raw)
	if err == nil && synced {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// loadRecord returns fs.ErrNotExist where there is no file.
func loadRecord[T any](path string) (record T, err error) {
	var e envelope[*T]
	raw, err := os.ReadFile(path)
	if err != nil {
		return record, fmt.Errorf("read record: %w", err)
	}
	// The version first: nobody knows what else a newer one has.
	if err := json.Unmarshal(raw, &struct {
		Version *int `json:"version"`
	}{&e.Version}); err != nil {
		return record, fmt.Errorf("decode %s: %w", path, err)
	}
	if e.Version != recordVersion {
		return record, fmt.Errorf("decode %s: version %d, this program knows %d", path, e.Version, recordVersion)
	}
	if err := json.Unmarshal(raw, &e); err != nil {
		return record, fmt.Errorf("decode %s: %w", path, err)
	}
	if e.Record == nil {
		return record, fmt.Errorf("decode %s: there is no record in it", path)
	}
	if r, ok := any(e.Record).(checked); ok {
		if err := r.check(strings.TrimSuffix(filepath.Base(path), ".json")); err != nil {
			return record, fmt.Errorf("decode %s: %w", path, err)
		}
	}
	return *e.Record, nil
}

// checked is a record that can tell whether it was written for the object that name means.
type checked interface{ check(name string) error }

func (spec *podSpec) check(name string) error {
	if spec.ID != name || spec.Config.PodSandboxConfig == nil || spec.CreatedAt.IsZero() {
		return errors.New("it is not the record of that pod")
	}
	return nil
}

func (spec *containerSpec) check(name string) error {
	if spec.ID != name || spec.Config.ContainerConfig == nil || spec.OCI == nil || spec.CreatedAt.IsZero() {
		return errors.New("it is not the record of that container")
	}
	return nil
}

func (st *podStatus) check(string) error {
	if st.BootID == "" && st.ReadyAt.IsZero() {
		return errors.New("it says nothing")
	}
	return nil
}

// loadAll reads every record of a directory, and sweeps what a daemon that died was writing. An unreadable record is
// set aside, with its path in the log, so that one broken file does not keep a node from starting.
func loadAll[T any](s *store, dir string) (map[string]T, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	all := make(map[string]T, len(entries))
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("sweep half-written record: %w", err)
			}
			continue
		}
		id, ok := recordID(e)
		if !ok {
			continue // set aside
		}
		record, err := loadRecord[T](path)
		if err != nil {
			s.setAside(path, err)
			continue
		}
		all[id] = record
	}
	return all, nil
}

// recordID is the id of the object whose record e is.
func recordID(e fs.DirEntry) (id string, ok bool) { return strings.CutSuffix(e.Name(), ".json") }

// loadStatus reads the status of an object; ok is false where there is none that can be read.
func loadStatus[T any](s *store, path string) (status T, ok bool) {
	status, err := loadRecord[T](path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.setAside(path, err)
		}
		return *new(T), false
	}
	return status, true
}

// setAside moves what cannot be read out of the way, for people to look at. An older one of the name goes.
func (s *store) setAside(path string, cause error) {
	aside := path + ".unreadable"
	err := os.RemoveAll(aside)
	if err = errors.Join(err, os.Rename(path, aside)); err != nil {
		cause = errors.Join(cause, err)
	}
	s.log.Error("record set aside: it cannot be read", "path", aside, "cause", cause)
}

// remove deletes files; absent ones do not matter.
func remove(paths ...string) error {
	var errs []error
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		crash.Point("pod/record-removed")
	}
	return errors.Join(errs...)
}

// podConfig and containerConfig are stored by protojson: encoding/json would bend environment values that are
// not UTF-8, and knows nothing of protobuf's names.
type podConfig struct{ *runtimeapi.PodSandboxConfig }

type containerConfig struct{ *runtimeapi.ContainerConfig }

var decoder = protojson.UnmarshalOptions{DiscardUnknown: true}

func (c podConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.PodSandboxConfig) }

func (c *podConfig) UnmarshalJSON(raw []byte) error {
	c.PodSandboxConfig = &runtimeapi.PodSandboxConfig{}
	return decoder.Unmarshal(raw, c.PodSandboxConfig)
}

func (c containerConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.ContainerConfig) }

func (c *containerConfig) UnmarshalJSON(raw []byte) error {
	c.ContainerConfig = &runtimeapi.ContainerConfig{}
	return decoder.Unmarshal(raw, c.ContainerConfig)
}
