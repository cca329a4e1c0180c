package ctr

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// ReadRecords returns what the keeper of a node has recorded of its containers, for when it is dead and cannot be asked.
// What cannot be read is left out: the directory goes with the node.
func ReadRecords(runtimeDir string) ([]State, error) {
	dir := filepath.Join(runtimeDir, wire.RecordDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var states []State
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), wire.RecordSuffix) {
			continue
		}
		if state, err := wire.ReadRecord(filepath.Join(dir, e.Name())); err == nil {
			states = append(states, state)
		}
	}
	return states, nil
}
