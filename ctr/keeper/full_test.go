package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/wire"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

// onDisk is the state that the keeper's record has, the zero value where there is no record.
func (n *node) onDisk(id string) wire.State {
	n.t.Helper()
	var r struct{ State wire.State }
	raw, err := os.ReadFile(filepath.Join(n.dir, "keeper", id+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return wire.State{}
	}
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return r.State
}

// TestAnExitIsWrittenWhenThereIsRoom: while the runtime directory is full, containers end and are told; their records
// follow, but not that of one that was deleted meanwhile.
func TestAnExitIsWrittenWhenThereIsRoom(t *testing.T) {
	n := newNode(t)
	records := filepath.Join(n.dir, "keeper")
	nstest.Small(t, records, "size=256k,nr_inodes=500")
	for _, id := range []string{"stays", "goes"} {
		n.create(id, sh("while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 9"))
		n.start(id)
	}
	free := nstest.Fill(t, records)
	for _, id := range []string{"stays", "goes"} {
		if code := n.execCode(id, "touch", "/tmp/go"); code != 0 {
			t.Fatalf("exec: %d", code)
		}
		if s := n.exit(id); s.ExitCode != 9 {
			t.Errorf("%s: %+v", id, s)
		}
		if s := n.onDisk(id); s.Exited() {
			t.Fatalf("%s: there was room for its record: %+v", id, s)
		}
	}
	_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "new", Spec: sh("true"), LogPath: n.logPath("new")})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a container without a record: %v", err)
	}
	n.delete("goes")
	free()
	eventually(t, "the exit is on disk", func() bool { return n.onDisk("stays").Exited() })
	if s := n.onDisk("stays"); s.ExitCode != 9 {
		t.Errorf("on disk: %+v", s)
	}
	if s := n.onDisk("goes"); s.ID != "" {
		t.Errorf("the record of a deleted container is back: %+v", s)
	}
	if s := n.run("new", sh("exit 3")); s.ExitCode != 3 {
		t.Errorf("with room: %+v", s)
	}
	for _, id := range []string{"stays", "new"} {
		n.delete(id)
	}
}

// TestARecordThatWaitsForRoomIsHandedOver: of an exit that could not be written the next keeper writes the record, and the
// one after that where the next could not either.
func TestARecordThatWaitsForRoomIsHandedOver(t *testing.T) {
	n, kill := separateNode(t)
	defer kill()
	n.create("c1", sh("while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 9"))
	n.start("c1")
	inTheWay := filepath.Join(n.dir, "keeper", "c1.json.tmp") // so that nothing can be written
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	if code := n.execCode("c1", "touch", "/tmp/go"); code != 0 {
		t.Fatalf("exec: %d", code)
	}
	n.exit("c1")
	for range 2 {
		n.replace()
	}
	if s := n.onDisk("c1"); s.Exited() {
		t.Fatalf("there was a way for its record: %+v", s)
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the exit is on disk", func() bool { return n.onDisk("c1").Exited() })
	if s := n.onDisk("c1"); s.ExitCode != 9 {
		t.Errorf("on disk: %+v", s)
	}
	n.delete("c1")
}

// TestALogThatEndsOnAFullDiskTellsItsLoss: the container runs to its end all the same.
func TestALogThatEndsOnAFullDiskTellsItsLoss(t *testing.T) {
	n := newNode(t)
	small := filepath.Join(n.dir, "small")
	nstest.Small(t, small, "size=64k,nr_inodes=50")
	n.create("c1", sh("seq 1 50000; exit 4"), func(r *ctr.CreateRequest) { r.LogPath = filepath.Join(small, "c1.log") })
	n.start("c1")
	if s := n.exit("c1"); s.ExitCode != 4 {
		t.Errorf("%+v", s)
	}
	n.delete("c1")
	if logged := n.log.String(); !strings.Contains(logged, "lost its last lines") || !strings.Contains(logged, "dropped_bytes=") {
		t.Errorf("the keeper's log:\n%s", logged)
	}
}
