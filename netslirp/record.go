package netslirp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// recordVersion changes when an older daemon could not read the record.
const recordVersion = 1

// record is what a pod has of the node's network. It is written before the first of it is taken and removed after
// the last is given back, so that whatever a pod may have is on disk at any moment.
type record struct {
	Version   int           `json:"version"`
	PodID     string        `json:"podID"`
	Link      string        `json:"link"`      // the node's end of the pod's veth; never used twice
	Prefix    netip.Prefix  `json:"prefix"`    // the pod CIDR that the address is from; its gateway stays while the pod does
	Addresses []netip.Addr  `json:"addresses"` // the first is the pod's IP
	Ports     []PortMapping `json:"ports,omitempty"`
}

func (r *record) ip() netip.Addr { return r.Addresses[0] }

// recordDir keeps records, one file a pod.
type recordDir string

// podIDForm keeps a pod id from being a path. Ids of the CRI are 64 hex digits.
var podIDForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

func (d recordDir) path(podID string) string { return filepath.Join(string(d), podID+".json") }

func (d recordDir) save(r *record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode network record: %w", err)
	}
	return writeFile(d.path(r.PodID), raw)
}

// remove is idempotent.
func (d recordDir) remove(podID string) error {
	if err := os.Remove(d.path(podID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network record: %w", err)
	}
	return nil
}

// load reads every record, and sweeps the temporary files of writes that a crash cut off.
func (d recordDir) load() (map[string]*record, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, fmt.Errorf("read network records: %w", err)
	}
	records := make(map[string]*record, len(entries))
	for _, e := range entries {
		path := filepath.Join(string(d), e.Name())
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("sweep network record: %w", err)
			}
			continue
		}
		var r record
		if err := readJSON(path, &r); err != nil {
			return nil, err
		}
		if r.Version != recordVersion || r.PodID+".json" != e.Name() || len(r.Addresses) == 0 {
			return nil, fmt.Errorf("network record %s is not of version %d: %w", path, recordVersion, ErrInvalid)
		}
		records[r.PodID] = &r
	}
	return records, nil
}

func readJSON(path string, v any) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read network state: %w", err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("decode network state %s: %w", path, err)
	}
	return nil
}

const tempSuffix = ".tmp"

// writeFile replaces path by data, so that a daemon that is killed leaves either the old content or the new. Nothing is
// fsynced: what is written here tells of interfaces and ports of this life of the node, which ends with the kernel.
func writeFile(path string, data []byte) (err error) {
	temp := path + tempSuffix // a record has one writer at a time
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(temp)
		}
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	if err = os.Rename(temp, path); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	return nil
}
