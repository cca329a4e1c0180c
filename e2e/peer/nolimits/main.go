// Command nolimits is runc where no cgroup controller is delegated. containerd asks for CPU shares for every sandbox,
// and has no setting against it; runc, rightly, fails where they cannot be set. This program takes the limits out of a
// new container's configuration and becomes the runc beside it: the peer enforces none of them.
//
// Made for the benchmark: it imports little, so that it adds as little time as it can to each of runc's.
package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

func main() {
	self, err := os.Readlink("/proc/self/exe")
	if err == nil && slices.Contains(os.Args, "create") {
		if i := slices.Index(os.Args, "--bundle"); i > 0 && i+1 < len(os.Args) {
			err = strip(filepath.Join(os.Args[i+1], "config.json"))
		}
	}
	if err == nil {
		err = syscall.Exec(filepath.Join(filepath.Dir(self), "runc"), os.Args, os.Environ())
	}
	os.Stderr.WriteString("nolimits: " + err.Error() + "\n")
	os.Exit(1)
}

// strip removes the limits from a runtime specification, and leaves the rest as it is.
func strip(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var spec, linux, resources map[string]json.RawMessage
	if err := json.Unmarshal(raw, &spec); err != nil {
		return err
	}
	if err := json.Unmarshal(spec["linux"], &linux); err != nil {
		return err
	}
	if linux["resources"] == nil {
		return nil
	}
	if err := json.Unmarshal(linux["resources"], &resources); err != nil {
		return err
	}
	for _, limit := range []string{"cpu", "memory", "pids", "blockIO", "hugepageLimits", "rdma", "unified"} {
		delete(resources, limit)
	}
	if linux["resources"], err = json.Marshal(resources); err != nil {
		return err
	}
	if spec["linux"], err = json.Marshal(linux); err != nil {
		return err
	}
	if raw, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}
