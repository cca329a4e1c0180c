package images

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// These tests have a defect in each goroutine that works for a pull: the call is told, the log has the stack, and the store
// is as good as before. A panic that gets through ends the test's process.

// defective panics at the nth Read.
type defective struct {
	io.Reader
	n int
}

func (d *defective) Read(p []byte) (int, error) {
	if d.n--; d.n < 0 {
		panic("on purpose")
	}
	return d.Reader.Read(p)
}

// defectiveContext panics when it is asked.
type defectiveContext struct{ context.Context }

func (defectiveContext) Err() error { panic("on purpose") }

// defectiveHash panics when it has something to hash.
type defectiveHash struct{ hash.Hash }

func (defectiveHash) Write([]byte) (int, error) { panic("on purpose") }

// lockedLog collects a log that several goroutines write.
type lockedLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func checkDefect(t *testing.T, err error, log *lockedLog) {
	t.Helper()
	if code := status.Code(grpcError(err)); code != codes.Internal || !strings.Contains(err.Error(), "the daemon has a defect (on purpose)") {
		t.Errorf("%v: %v", code, err)
	}
	if said := log.String(); !strings.Contains(said, "msg=panic") || !strings.Contains(said, "defect_test.go") {
		t.Errorf("the log: %s", said)
	}
}

func TestADefectInAPullIsItsError(t *testing.T) {
	tarball := archiveOf(t, file("a", strings.Repeat("x", 3<<20)))
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	if _, err := zw.Write(tarball); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	blob := func(raw []byte, panics int) origin {
		return origin{open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(&defective{&oneByOne{bytes.NewReader(raw)}, panics}), nil
		}}
	}
	for name, places := range map[string]func(layerWant) []origin{
		"in the pull": func(layerWant) []origin { panic("on purpose") },
		"in opening a blob": func(layerWant) []origin {
			return []origin{{open: func(context.Context) (io.ReadCloser, error) { panic("on purpose") }}}
		},
		"in the first read":        func(layerWant) []origin { return []origin{blob(tarball, 0)} },
		"in a later read":          func(layerWant) []origin { return []origin{blob(tarball, 100)} },
		"beside an open registry":  func(layerWant) []origin { return []origin{{open: away}, blob(tarball, 1)} },
		"in a decompressor's read": func(layerWant) []origin { return []origin{blob(zipped.Bytes(), 3)} },
	} {
		t.Run(name, func(t *testing.T) {
			log := &lockedLog{}
			s := openStore(t, Config{Log: textLog(log)})
			want := layerWant{DiffID: sum(tarball), Size: -1}
			checkDefect(t, s.addLayers(context.Background(), []layerWant{want}, places), log)
			if s.fetch.slots.busy() || len(s.fetch.slots.hosts) > 0 || len(s.fetch.unpacks.flights) > 0 {
				t.Errorf("left: slots %v, flights %v", s.fetch.slots.hosts, s.fetch.unpacks.flights)
			}
			if left, err := os.ReadDir(s.path("tmp")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			// The next one is served.
			err := s.addLayers(context.Background(), []layerWant{want}, func(layerWant) []origin { return []origin{blob(tarball, 1<<30)} })
			if err != nil || s.index.layer(want.DiffID) == nil {
				t.Errorf("the next pull: %v", err)
			}
			if err := s.collect(); err != nil {
				t.Error(err)
			}
		})
	}
}

// away is a place that cannot be reached.
func away(context.Context) (io.ReadCloser, error) { return nil, ErrUnavailable }

// oneByOne gives little at a time.
type oneByOne struct{ io.Reader }

func (o *oneByOne) Read(p []byte) (int, error) { return o.Reader.Read(p[:min(len(p), 1<<10)]) }

func TestADefectInUnpackingIsItsError(t *testing.T) {
	log := &lockedLog{}
	s := openStore(t, Config{Log: textLog(log)})
	dir := filepath.Join(t.TempDir(), "layer")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	raw := archiveOf(t, file("a", "x"))
	_, err := s.unpackLayer(defectiveContext{context.Background()}, dir, layerWant{DiffID: sum(raw), Size: -1}, s.newRoom(), bytes.NewReader(raw))
	checkDefect(t, err, log)
}

// TestADefectInHashingHoldsNobodyUp: the reader comes to its end, with more than the buffers hold.
func TestADefectInHashingHoldsNobodyUp(t *testing.T) {
	log := &lockedLog{}
	tee, err := newHashTee(strings.NewReader(strings.Repeat("x", 20*streamBuffer)), sum(nil), textLog(log))
	if err != nil {
		t.Fatal(err)
	}
	tee.hash = defectiveHash{sha256.New()}
	if _, err := io.Copy(io.Discard, tee); err != nil {
		t.Error(err)
	}
	_, err = tee.finish()
	checkDefect(t, err, log)
}

// TestADefectInAFlightIsForAllThatWait, and the next one flies.
func TestADefectInAFlightIsForAllThatWait(t *testing.T) {
	log := &lockedLog{}
	g := flightGroup[int]{log: textLog(log)}
	begun, joined := make(chan struct{}), make(chan struct{})
	errs := make(chan error, 2)
	go func() {
		_, _, err := g.do(context.Background(), "k", func(context.Context) (int, error) {
			close(begun)
			<-joined
			panic("on purpose")
		})
		errs <- err
	}()
	<-begun
	go func() {
		_, _, err := g.do(context.Background(), "k", func(context.Context) (int, error) { return 0, errors.New("it did not join") })
		errs <- err
	}()
	for waiting := 0; waiting < 2; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		waiting = g.flights["k"].waiters
		g.mu.Unlock()
	}
	close(joined)
	for range 2 {
		checkDefect(t, <-errs, log)
	}
	if val, _, err := g.do(context.Background(), "k", func(context.Context) (int, error) { return 7, nil }); val != 7 || err != nil {
		t.Errorf("the next one: %d, %v", val, err)
	}
}
