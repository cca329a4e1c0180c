package keeper

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// limitFiles are the files of a cgroup which the fields of LinuxResources stand for; its unified keys name others.
var limitFiles = []string{"cpu.idle", "cpu.max", "cpu.max.burst", "cpu.weight", "cpuset.cpus", "cpuset.mems", "hugetlb.*.max",
	"io.bfq.weight", "io.max", "io.weight", "memory.high", "memory.low", "memory.max", "memory.min", "memory.swap.max", "pids.max", "rdma.max"}

// limits are files of a cgroup and what they held. The engines write an update file by file and stop at the first that
// the kernel refuses; to put back what they were told before would leave what that does not name.
type limits struct {
	dir   string
	files map[string]string
}

// saveLimits reads every file that an update may write. In dir "", and of a file that cannot be read, there is nothing
// to be put back: it is missing, or an order to the kernel and not a limit (memory.reclaim).
func saveLimits(dir string, r *specs.LinuxResources) (limits, error) {
	l := limits{dir: dir, files: map[string]string{}}
	if dir == "" {
		return l, nil
	}
	paths := slices.Collect(maps.Keys(r.Unified))
	for _, pattern := range limitFiles {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return l, fmt.Errorf("find limits: %w", err)
		}
		for _, path := range found {
			paths = append(paths, filepath.Base(path))
		}
	}
	for _, name := range paths {
		if strings.Contains(name, "/") {
			continue // another cgroup's: the engines refuse it
		}
		if raw, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			l.files[name] = string(raw)
		}
	}
	return l, nil
}

// restore writes back what is not as it was.
func (l limits) restore() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(l.files)) {
		path := filepath.Join(l.dir, name)
		now, err := os.ReadFile(path)
		if err == nil && string(now) != l.files[name] {
			err = writeLines(path, undoing(l.files[name], string(now)))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("put %s back: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// undoing makes the lines that bring a file from now to then. Keys that are new in a keyed file, "8:0 rbps=9 wbps=max"
// or "8:0 100", get the value that takes them away.
func undoing(then, now string) []string {
	lines := strings.Split(strings.TrimSuffix(then, "\n"), "\n")
	kept := map[string]bool{}
	for _, line := range lines {
		key, _, _ := strings.Cut(line, " ")
		kept[key] = true
	}
	for line := range strings.Lines(now) {
		fields := strings.Fields(line)
		if len(fields) < 2 || !strings.Contains(fields[0], ":") || kept[fields[0]] {
			continue // a single value, which is written over
		}
		for i, field := range fields[1:] {
			name, _, found := strings.Cut(field, "=")
			if fields[i+1] = "default"; found {
				fields[i+1] = name + "=max"
			}
		}
		lines = append([]string{strings.Join(fields, " ")}, lines...)
	}
	return slices.DeleteFunc(lines, func(line string) bool { return line == "" && len(lines) > 1 })
}

// writeLines writes one line at a time, as the kernel takes keyed files. An empty one is a value too (cpuset.cpus).
func writeLines(path string, lines []string) error {
	for _, line := range lines {
		if err := os.WriteFile(path, []byte(line+"\n"), 0); err != nil {
			return err
		}
	}
	return nil
}
