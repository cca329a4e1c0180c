package rootless

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// recordVersion is the version of the file's shape; a newer one is refused.
const recordVersion = 1

// Record says which process is a node's parent, and what it found of the host. The parent process writes it,
// everybody else reads it.
type Record struct {
	Version     int       `json:"version"`
	Name        string    `json:"name"`
	PID         int       `json:"pid"`      // of the parent, in the host's pid namespace
	PIDStart    uint64    `json:"pidStart"` // field 22 of /proc/PID/stat, in clock ticks: a pid alone can be reused
	Program     string    `json:"program"`  // version of the program
	Started     time.Time `json:"started"`
	Driver      string    `json:"networkDriver"`
	Cgroup      string    `json:"cgroup"`      // the node's cgroup directory as the host sees it, "" for none
	CgroupFound string    `json:"cgroupFound"` // a sentence
	CgroupHint  string    `json:"cgroupHint"`  // what to run to get the rest, "" for nothing
	// CgroupAttempts are sentences, one for each place where a cgroup was looked for, in order.
	CgroupAttempts []string `json:"cgroupAttempts,omitempty"`
}

// Alive tells whether the recorded parent runs.
func (r Record) Alive() bool {
	start, err := pidStart(r.PID)
	return err == nil && start == r.PIDStart
}

// ReadRecord reads the node's record; fs.ErrNotExist where the node is not up.
func (n Node) ReadRecord() (Record, error) {
	raw, err := os.ReadFile(n.recordFile())
	if err != nil {
		return Record{}, fmt.Errorf("read node record: %w", err)
	}
	var r Record
	if err := json.Unmarshal(raw, &r); err != nil {
		return Record{}, fmt.Errorf("read %s: %w", n.recordFile(), err)
	}
	if r.Version != recordVersion {
		return Record{}, fmt.Errorf("read %s: it is of version %d, this program knows %d", n.recordFile(), r.Version, recordVersion)
	}
	return r, nil
}

// WriteRecord records this process as the node's parent.
func (n Node) WriteRecord(r Record) error {
	start, err := pidStart(os.Getpid())
	if err != nil {
		return err
	}
	r.Version, r.Name, r.PID, r.PIDStart, r.Started = recordVersion, n.Name, os.Getpid(), start, time.Now()
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := n.recordFile() + ".tmp"
	if err := writeSynced(tmp, raw); err != nil {
		return errors.Join(fmt.Errorf("write node record: %w", err), os.Remove(tmp))
	}
	return os.Rename(tmp, n.recordFile())
}

func writeSynced(path string, raw []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, werr := f.Write(raw)
	return errors.Join(werr, f.Sync(), f.Close())
}

// pidStart reads field 22 of /proc/PID/stat. The command's name, field 2, may hold blanks and brackets, so the
// fields are counted from the last bracket (proc_pid_stat(5)).
func pidStart(pid int) (uint64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	line := string(raw)
	fields := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
	if len(fields) < 20 || fields[0] == "Z" {
		return 0, fmt.Errorf("process %d is gone", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
