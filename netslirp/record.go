package netslirp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// recordVersion changes when an older daemon could not read the record.
const recordVersion = 2

// record is what a pod has of the node's network. It is written before the first of it is taken and removed after
// the last is given back, so that whatever a pod may have is on disk at any moment.
type record struct {
	Version int    `json:"version"`
	PodID   string `json:"podID"`
	Link    string `json:"link"` // the node's end of the pod's veth; never used twice
	// Addresses has the pod's IP first. Each carries the length of the pod CIDR that it is from, as in 10.88.0.2/16,
	// whose gateway stays while the pod does.
	Addresses []netip.Prefix `json:"addresses"`
	Ports     []PortMapping  `json:"ports,omitempty"`
	Portless  bool           `json:"portless,omitempty"` // made again (rebuild), and its ports are yet to be found
}

// ip is the pod's IP; invalid while the pod has none yet.
func (r *record) ip() netip.Addr {
	if len(r.Addresses) == 0 {
		return netip.Addr{}
	}
	return r.Addresses[0].Addr()
}

// address is the pod's of that version of IP, else its first.
func (r *record) address(f *family) netip.Addr {
	for _, a := range r.Addresses {
		if familyOf(a.Addr()) == f {
			return a.Addr()
		}
	}
	return r.ip()
}

func (r *record) has(ip netip.Addr) bool {
	return slices.ContainsFunc(r.Addresses, func(a netip.Prefix) bool { return a.Addr() == ip })
}

// UnmarshalJSON reads version 1 as well, of the daemons that gave a pod one address: its CIDR stood apart.
func (r *record) UnmarshalJSON(raw []byte) error {
	type plain record
	var v struct {
		plain
		Prefix    netip.Prefix      `json:"prefix"`
		Addresses []json.RawMessage `json:"addresses"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return err
	}
	*r = record(v.plain)
	for _, raw := range v.Addresses {
		var addr netip.Addr
		var a netip.Prefix
		var err error
		if v.Version == 1 {
			err = json.Unmarshal(raw, &addr)
			a = netip.PrefixFrom(addr, v.Prefix.Bits())
		} else {
			err = json.Unmarshal(raw, &a)
		}
		if err != nil {
			return err
		}
		r.Addresses = append(r.Addresses, a)
	}
	if r.Version == 1 {
		r.Version = recordVersion
	}
	return nil
}

// check tells what makes the record of no use.
func (r *record) check(podID string) error {
	switch {
	case r.Version != recordVersion:
		return fmt.Errorf("network record is of version %d, this program knows %d: %w", r.Version, recordVersion, ErrInvalid)
	case r.PodID != podID || r.Link == "" || len(r.Addresses) == 0:
		return fmt.Errorf("network record is incomplete: %w", ErrInvalid)
	case slices.ContainsFunc(r.Addresses, func(a netip.Prefix) bool { return !a.IsValid() }):
		return fmt.Errorf("network record has a bad address: %w", ErrInvalid)
	}
	return nil
}

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
	crash.Point("net/record-removed")
	return nil
}

// unreadable is appended to the name of a file that is set aside.
const unreadable = ".unreadable"

// load reads every record, and sweeps the temporary files of writes that a crash cut off. A record that cannot be
// read is set aside, so that it does not keep the node from starting; lost are the pods of those.
func (d recordDir) load(log *slog.Logger) (records map[string]*record, lost []string, err error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, nil, fmt.Errorf("read network records: %w", err)
	}
	records = make(map[string]*record, len(entries))
	for _, e := range entries {
		path := filepath.Join(string(d), e.Name())
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := os.RemoveAll(path); err != nil {
				return nil, nil, fmt.Errorf("sweep network record: %w", err)
			}
			continue
		}
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue // set aside
		}
		r := &record{}
		err := readJSON(path, r)
		if err == nil {
			err = r.check(id)
		}
		if err != nil {
			setAside(path, err, log)
			lost = append(lost, id)
			continue
		}
		records[id] = r
	}
	return records, lost, nil
}

// setAside renames a file that cannot be read, for people to look at. An older one of the name goes.
func setAside(path string, cause error, log *slog.Logger) {
	err := os.RemoveAll(path + unreadable)
	if err = errors.Join(err, os.Rename(path, path+unreadable)); err != nil {
		cause = errors.Join(cause, err)
	}
	log.Error("network state set aside: it cannot be read", "path", path+unreadable, "cause", cause)
}

// makeDir makes a directory of state, and sets aside what is in its place and is none.
func makeDir(dir string, log *slog.Logger) error {
	if info, err := os.Lstat(dir); err == nil && !info.IsDir() {
		setAside(dir, errors.New("it is no directory"), log)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory of network state: %w", err)
	}
	return nil
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
	crash.Point("net/record-written")
	if err = os.Rename(temp, path); err != nil {
		return fmt.Errorf("write network state: %w", err)
	}
	crash.Point("net/record-replaced")
	return nil
}
