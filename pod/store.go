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
// data directory and outlive the machine's boot; statuses live in the runtime directory, as what they tell of.
type store struct {
	data string
	run  string
	log  *slog.Logger
}

func openStore(data, run string, log *slog.Logger) (*store, error) {
	s := &store{data: data, run: run, log: log}
	for _, dir := range []string{data, run} {
		for _, sub := range []string{"pods", "containers"} {
			if err := os.MkdirAll(filepath.Join(dir, sub), 0o711); err != nil {
				return nil, fmt.Errorf("make state directory: %w", err)
			}
		}
	}
	return s, nil
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
func loadRecord[T any](path string) (T, error) {
	var e envelope[T]
	raw, err := os.ReadFile(path)
	if err != nil {
		return e.Record, fmt.Errorf("read record: %w", err)
	}
	if err := json.Unmarshal(raw, &e); err != nil {
		return e.Record, fmt.Errorf("decode %s: %w", path, err)
	}
	if e.Version != recordVersion {
		return e.Record, fmt.Errorf("decode %s: version %d, this program knows %d", path, e.Version, recordVersion)
	}
	return e.Record, nil
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
			if err := remove(path); err != nil {
				return nil, fmt.Errorf("sweep half-written record: %w", err)
			}
			continue
		}
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || e.IsDir() {
			continue
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

// loadStatus reads the status of an object; ok is false where there is none that can be read.
func loadStatus[T any](s *store, dir string) (status T, ok bool) {
	status, err := loadRecord[T](statusPath(dir))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.setAside(statusPath(dir), err)
		}
		return status, false
	}
	return status, true
}

func (s *store) setAside(path string, cause error) {
	aside := path + ".unreadable"
	if err := os.Rename(path, aside); err != nil {
		cause = errors.Join(cause, err)
	}
	s.log.Error("record set aside: its object is unknown from now on", "path", aside, "cause", cause)
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
