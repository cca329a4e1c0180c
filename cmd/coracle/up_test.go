package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/coracle-cri/coracle/rootless"
)

// The lock is the data directory's: a node that was started with another XDG_DATA_HOME holds another one.
func TestASweepSparesALiveNode(t *testing.T) {
	node := rootless.Node{Name: "n", RuntimeDir: t.TempDir(), DataDir: t.TempDir()}
	record := filepath.Join(node.RuntimeDir, "node.json")
	if err := node.WriteRecord(rootless.Record{}); err != nil {
		t.Fatal(err)
	}
	r, err := node.ReadRecord()
	if err != nil {
		t.Fatal(err)
	}
	write := func(change func(*rootless.Record)) {
		t.Helper()
		r := r
		change(&r)
		raw, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(record, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	parent := startOf(t, os.Getppid())
	write(func(r *rootless.Record) { r.PID, r.PIDStart = os.Getppid(), parent })
	if err := sweep(node); err == nil || !strings.Contains(err.Error(), "is up already") || !strings.Contains(err.Error(), "XDG_DATA_HOME") {
		t.Errorf("sweep of a live node: %v", err)
	}
	if _, err := os.Stat(record); err != nil {
		t.Errorf("its record: %v", err)
	}
	write(func(r *rootless.Record) { r.PID, r.PIDStart = os.Getppid(), parent+1 })
	if err := sweep(node); err != nil {
		t.Errorf("sweep of a dead node whose pid is another's: %v", err)
	}
	if _, err := os.Stat(node.RuntimeDir); !os.IsNotExist(err) {
		t.Errorf("its directory: %v", err)
	}
}

func startOf(t *testing.T, pid int) uint64 {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	line := string(raw)
	start, err := strconv.ParseUint(strings.Fields(line[strings.LastIndexByte(line, ')')+1:])[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return start
}
