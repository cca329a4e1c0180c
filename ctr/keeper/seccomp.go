package keeper

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"sync"

	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/coracle-cri/coracle/ctr/keeper/filters"
)

// filterArg is the argument with which this program compiles the seccomp profile on its standard input (see filters.Record).
const filterArg = "seccomp-filter"

// maxFilters bounds how many profiles are kept. A node has one or two; with more, all start anew.
const maxFilters = 64

// filterStore keeps the compiled filters of the seccomp profiles that containers have. A profile that is new is compiled
// twice: by the container's init as ever, which nothing waits for, and by a process of its own for those that follow.
type filterStore struct {
	keeper *Keeper

	mu   sync.Mutex
	kept map[[sha256.Size]byte]*os.File // nil: it is being made
}

// use returns the filter of a profile, for a process to be started with; nil where there is none yet.
func (s *filterStore) use(profile *configs.Seccomp) *os.File {
	if profile == nil || notifies(profile) {
		return nil
	}
	raw, err := json.Marshal(profile)
	if err != nil {
		return nil // so the start fails, and says why
	}
	key := sha256.Sum256(raw)
	s.mu.Lock()
	defer s.mu.Unlock()
	file, known := s.kept[key]
	if !known {
		if len(s.kept) >= maxFilters {
			clear(s.kept) // the runtime closes a file when no start has it any more
		}
		s.kept[key] = nil
		s.keeper.tasks.Go(func() { s.make(key, raw) })
	}
	return file
}

// notifies tells whether a profile asks another process: its filter has a descriptor to be passed on, once a load.
func notifies(profile *configs.Seccomp) bool {
	for _, call := range profile.Syscalls {
		if call != nil && call.Action == configs.Notify {
			return true
		}
	}
	return profile.DefaultAction == configs.Notify
}

// make compiles a profile. Where that fails, the next start tries again: what it met may have been want of memory or of
// processes. Each process goes on to compile it for itself, and says what is wrong.
func (s *filterStore) make(key [sha256.Size]byte, profile []byte) {
	file, err := s.compile(profile)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.keeper.log.Debug("seccomp filter is not kept", "error", err)
		if s.kept[key] == nil { // not by another who began anew
			delete(s.kept, key)
		}
		return
	}
	s.kept[key] = file
}

// close lets all go, when nothing is started any more.
func (s *filterStore) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, file := range s.kept {
		if file != nil {
			_ = file.Close() // a memfd buffers nothing
		}
	}
	clear(s.kept)
}

func (s *filterStore) compile(profile []byte) (_ *os.File, err error) {
	file, err := filters.New()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
		}
	}()
	var said bytes.Buffer
	cmd := exec.Command("/proc/self/exe", filterArg)
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = bytes.NewReader(profile), &said, []*os.File{file}
	if err := s.keeper.children.runToEnd(cmd, cmd.Start); err != nil {
		return nil, fmt.Errorf("compile seccomp profile: %w: %s", err, bytes.TrimSpace(said.Bytes()))
	}
	return file, filters.Seal(file)
}

// recordFilter is what the process of filterArg does. It does not return.
func recordFilter() {
	fmt.Fprintln(os.Stderr, filters.Record(os.Stdin))
	os.Exit(1)
}
