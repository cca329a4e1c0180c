package wire

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The keeper's records, one file a container: RUNTIMEDIR/RecordDir/ID + RecordSuffix. The keeper alone writes them; others
// read them when it is dead.
const (
	RecordDir     = "keeper"
	RecordSuffix  = ".json"
	RecordVersion = 1
)

// Record is a container's file.
type Record struct {
	Version int   `json:"version"`
	State   State `json:"state"`
}

// ReadRecord reads one file, which must be that of the container that it is named after.
func ReadRecord(path string) (State, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return State{}, fmt.Errorf("read record: %w", err)
	}
	var r Record
	if err := json.Unmarshal(raw, &r); err != nil {
		return State{}, fmt.Errorf("read record %s: %w", path, err)
	}
	if r.Version != RecordVersion {
		return State{}, fmt.Errorf("read record %s: version %d is not %d", path, r.Version, RecordVersion)
	}
	if id := strings.TrimSuffix(filepath.Base(path), RecordSuffix); r.State.ID != id {
		return State{}, fmt.Errorf("read record %s: it is that of %q", path, r.State.ID)
	}
	return r.State, nil
}
