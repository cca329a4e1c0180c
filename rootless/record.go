package rootless

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
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

// ErrUp says that the node runs already.
var ErrUp = errors.New("the node is up already")

// Lock is held by a node's parent as long as the node lives; the kernel lets go of it when the process dies.
type Lock struct{ file *os.File }

// TryLock takes the node's lock, ErrUp where another process holds it. The file lies in the data directory,
// which two nodes never share and which is never swept.
func (n Node) TryLock() (*Lock, error) {
	if lock := n.handedOver(); lock != nil {
		return lock, nil
	}
	f, err := n.openLock()
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrUp
		}
		return nil, fmt.Errorf("lock %s: %w", n.lockFile(), err)
	}
	return &Lock{file: f}, nil
}

// openLock mends what keeps the file from being opened. A mode is mended in place, so that whoever has the lock keeps it.
func (n Node) openLock() (*os.File, error) {
	path := n.lockFile()
	open := func() (*os.File, error) { return os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600) }
	f, err := open()
	switch {
	case errors.Is(err, fs.ErrPermission):
		err = os.Chmod(path, 0o600)
	case errors.Is(err, unix.EISDIR):
		aside := path + ".unreadable"
		slog.Error("lock set aside: it is no file", "path", path, "moved", aside)
		err = errors.Join(os.RemoveAll(aside), os.Rename(path, aside))
	default:
		return f, err
	}
	if err != nil {
		return nil, err
	}
	return open()
}

// lockEnv names the descriptor of a lock that was handed over.
const lockEnv = "_CORACLE_LOCK_FD"

// HandOver lets cmd, which is not started yet, take the lock by its TryLock. A lock of flock(2) is the open file's,
// which a child shares: it is held all the way, and Release then lets go of this process's part.
func (l *Lock) HandOver(cmd *exec.Cmd) {
	cmd.ExtraFiles = append(cmd.ExtraFiles, l.file)
	cmd.Env = append(cmd.Environ(), fmt.Sprintf("%s=%d", lockEnv, 2+len(cmd.ExtraFiles)))
}

// handedOver takes the lock that the process before has handed over, once; nil where there is none.
func (n Node) handedOver() *Lock {
	fd, err := strconv.Atoi(os.Getenv(lockEnv))
	_ = os.Unsetenv(lockEnv) // it is nobody else's; the name is valid
	if err != nil || fd < 3 {
		return nil
	}
	var ours, theirs unix.Stat_t
	if unix.Fstat(fd, &theirs) != nil || unix.Stat(n.lockFile(), &ours) != nil || ours.Dev != theirs.Dev || ours.Ino != theirs.Ino {
		return nil
	}
	unix.CloseOnExec(fd)
	return &Lock{file: os.NewFile(uintptr(fd), n.lockFile())}
}

// Release lets go of the lock.
func (l *Lock) Release() error { return l.file.Close() }

// Sweep removes what a node leaves on disk when it dies without ceremony. The caller holds the node's lock.
func (n Node) Sweep() error {
	if err := os.RemoveAll(n.RuntimeDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweep runtime directory: %w", err)
	}
	return nil
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
