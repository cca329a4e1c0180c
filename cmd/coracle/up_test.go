package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/gorilla/mux"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/router"
	"github.com/rootless-containers/rootlesskit/v3/pkg/parent"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"

	"github.com/coracle-cri/coracle/rootless"
)

// A node of an earlier version holds the lock of its data directory alone.
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
	started := startOf(t, os.Getppid())
	write(func(r *rootless.Record) { r.PID, r.PIDStart = os.Getppid(), started })
	if err := sweep(node, node.Sweep); err == nil || !strings.Contains(err.Error(), "is up already") || !strings.Contains(err.Error(), "XDG_DATA_HOME") {
		t.Errorf("sweep of a live node: %v", err)
	}
	if _, err := os.Stat(record); err != nil {
		t.Errorf("its record: %v", err)
	}
	// Where its record cannot be read, RootlessKit's lock tells.
	if err := errors.Join(os.WriteFile(record, []byte("{"), 0o600), os.Mkdir(node.RootlesskitDir(), 0o700)); err != nil {
		t.Fatal(err)
	}
	lock, err := parent.LockStateDir(node.RootlesskitDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := sweep(node, node.Sweep); err == nil || !strings.Contains(err.Error(), "is up already") || !strings.Contains(err.Error(), "XDG_DATA_HOME") {
		t.Errorf("sweep of a live node without its record: %v", err)
	}
	if _, err := os.Stat(record); err != nil {
		t.Errorf("its record: %v", err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	write(func(r *rootless.Record) { r.PID, r.PIDStart = os.Getppid(), started+1 })
	if err := sweep(node, node.Sweep); err != nil {
		t.Errorf("sweep of a dead node whose pid is another's: %v", err)
	}
	if _, err := os.Stat(node.RuntimeDir); !os.IsNotExist(err) {
		t.Errorf("its directory: %v", err)
	}
}

// A daemon that has taken the place of an earlier one below the same parent publishes ports where that parent serves them.
func TestPortsOfAnEarlierParent(t *testing.T) {
	node := rootless.Node{Name: "n", RuntimeDir: t.TempDir(), DataDir: t.TempDir()}
	if got := portsSocket(node); got != node.APISocket() {
		t.Errorf("with no socket of our own: %s", got)
	}
	if err := os.WriteFile(node.PortsSocket(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := portsSocket(node); got != node.PortsSocket() {
		t.Errorf("with one: %s", got)
	}
}

// A daemon of an earlier version that is started again below this parent knows RootlessKit's socket alone.
func TestPortsForAnEarlierDaemon(t *testing.T) {
	r := mux.NewRouter()
	router.AddRoutes(r, &router.Backend{PortDriver: ownPorts{}})
	server := httptest.NewUnstartedServer(r)
	socket := filepath.Join(t.TempDir(), "api.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server.Listener.Close()
	server.Listener = listener
	server.Start()
	defer server.Close()
	c, err := client.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.HTTPClient().CloseIdleConnections()
	_, err = c.PortManager().AddPort(context.Background(), port.Spec{Proto: "tcp", ParentPort: 8080, ChildPort: 80})
	if err == nil || !strings.Contains(err.Error(), "coracle down, then coracle up") {
		t.Errorf("a port of an earlier daemon: %v", err)
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
