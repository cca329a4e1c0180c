package faults

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// An operation is one call of the CRI, with what comes before it and after it.
type operation struct {
	name    string
	prepare func(*stage) error // makes what the call needs
	call    func(*stage) error
	// retry is what a kubelet does that got no answer: it looks what there is, and asks again. It fails where the thing is
	// neither whole nor gone, and where it cannot be had in the end.
	retry func(*stage) error
}

// stage is where one operation is played, once. Afterwards everything is taken away.
type stage struct {
	*node
	image          string // pulled
	registry       *otherImage
	pod, container string
	config         *runtimeapi.PodSandboxConfig
}

// theatre is a node whose daemon has crash points, and what it has when nothing is played.
type theatre struct {
	*node
	image  string
	other  *otherImage
	before *census
}

func openTheatre(t *testing.T) *theatre {
	t.Helper()
	n := up(t, withPoints)
	h := &theatre{node: n, image: n.pullBusybox(), other: serveOther(t)}
	warm := h.stage()
	if err := errors.Join(running(warm), warm.strike()); err != nil { // the first pod makes directories that stay
		t.Fatal(err)
	}
	var err error
	if h.before, err = n.census(); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *theatre) stage() *stage { return &stage{node: h.node, image: h.image, registry: h.other} }

// play plays an operation, act instead of its call, and leaves nothing.
func (h *theatre) play(op operation, act func(*stage) error) error {
	s := h.stage()
	return errors.Join(s.play(op, act), s.strike(), h.same(h.before))
}

// passages are those of a call that succeeds.
func (h *theatre) passages(op operation) ([]passage, error) {
	var points []string
	err := h.play(op, func(s *stage) (err error) {
		points, err = h.trace(func() error { return op.call(s) })
		return err
	})
	return passages(points), err
}

// TestPoints lets the daemon die at each point that an operation passes. What comes back must know the truth.
func TestPoints(t *testing.T) {
	h := openTheatre(t)
	seen, kills, ran := map[string]bool{}, 0, 0
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			h.t = t
			ran++
			all, err := h.passages(op)
			if err != nil {
				t.Fatal(err)
			}
			for i, death := range all {
				seen[death.point] = true
				if testing.Short() && i%sample != len(all)%sample {
					continue
				}
				err := h.play(op, func(s *stage) error {
					died, err := h.dieAt(func() error { return op.call(s) }, death)
					kills += died
					return err
				})
				if err != nil {
					t.Errorf("SIGKILL at %s: %v", death, err)
				}
			}
		})
	}
	h.t = t
	t.Logf("the daemon was killed at a point %d times", kills)
	if ran < len(operations) || testing.Short() {
		return // some were left out
	}
	for _, name := range pointsInSource(t) {
		if !seen[name] {
			t.Errorf("no operation passes the point %s", name)
		}
	}
}

// sample: one in so many points is tried in short.
const sample = 12

// TestPointsOfRecovery lets the daemon die late in an operation, and the next one at each point that it passes while it cleans
// up after the first.
func TestPointsOfRecovery(t *testing.T) {
	if testing.Short() {
		t.Skip("one kill more for each of a hundred points: make faults runs it")
	}
	h := openTheatre(t)
	for _, op := range operations {
		if !slices.Contains([]string{"RunPodSandbox", "StartContainer", "RemoveContainer", "RemovePodSandbox", "PullImage of a tag that moved"}, op.name) {
			continue
		}
		t.Run(op.name, func(t *testing.T) {
			h.t = t
			all, err := h.passages(op)
			if err != nil {
				t.Fatal(err)
			}
			first := all[len(all)*3/4]
			var points []string
			err = h.play(op, func(s *stage) (err error) {
				points, err = h.trace(func() error {
					_, err := h.dieAt(func() error { return op.call(s) }, first)
					return err
				})
				return err
			})
			if err != nil {
				t.Fatalf("SIGKILL at %s: %v", first, err)
			}
			died := slices.Index(passages(points), first)
			t.Logf("after SIGKILL at %s the next daemon passes %d points", first, len(points)-died-1)
			for _, second := range passages(points[died+1:]) {
				err := h.play(op, func(s *stage) error {
					_, err := h.dieAt(func() error { return op.call(s) }, first, second)
					return err
				})
				if err != nil {
					t.Errorf("SIGKILL at %s, and in the recovery at %s: %v", first, second, err)
				}
			}
		})
	}
	h.t = t
}

// play plays an operation: act is its call, in whatever way.
func (s *stage) play(op operation, act func(*stage) error) error {
	if op.prepare != nil {
		if err := op.prepare(s); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	if err := act(s); err != nil {
		return fmt.Errorf("call: %w", err)
	}
	if err := s.agrees(); err != nil {
		return fmt.Errorf("the CRI and the facts: %w", err)
	}
	if err := op.retry(s); err != nil {
		return fmt.Errorf("try again: %w", err)
	}
	if err := s.agrees(); err != nil {
		return fmt.Errorf("the CRI and the facts after the second try: %w", err)
	}
	return nil
}

// strike takes away whatever is there but the first image.
func (s *stage) strike() error {
	ctx := s.context()
	pods, err := s.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods.Items {
		_, err := s.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
		errs = append(errs, err, os.RemoveAll(s.path("work", "logs")))
	}
	images, err := s.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	for _, i := range images.GetImages() {
		if !slices.Contains(i.RepoTags, s.image) {
			_, err := s.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: i.Id}})
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, err)...)
}

// trace returns the points that a call passes, in order.
func (n *node) trace(call func() error) ([]string, error) {
	file := n.path("faults", "trace")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	callErr := call()
	raw, err := os.ReadFile(file)
	return strings.Fields(string(raw)), errors.Join(callErr, err, os.Remove(file))
}

// passage is the nth time that a daemon passes a point.
type passage struct {
	point string
	nth   int
}

func (p passage) String() string { return fmt.Sprintf("%s, the %d. time", p.point, p.nth) }

// passages numbers the points of a trace.
func passages(points []string) []passage {
	count := map[string]int{}
	var out []passage
	for _, p := range points {
		count[p]++
		out = append(out, passage{p, count[p]})
	}
	return out
}

// dieAt makes a call whose daemon dies at a passage, the next daemon at the next one, and so on, and waits for a daemon. It
// returns how many died; where none did, the call must have succeeded.
func (n *node) dieAt(call func() error, deaths ...passage) (died int, err error) {
	armed, done := n.path("faults", "armed"), n.path("faults", "fired")
	var lines []byte
	for _, d := range deaths {
		lines = fmt.Appendf(lines, "%s %d\n", d.point, d.nth)
	}
	if err := os.WriteFile(armed, lines, 0o600); err != nil {
		return 0, err
	}
	callErr := call()
	if _, err := os.Stat(done); err != nil {
		return 0, errors.Join(callErr, os.Remove(armed))
	}
	if callErr != nil && status.Code(callErr) != codes.Unavailable { // what is not of the RPC counts too: its code is Unknown
		err = callErr
	}
	err = errors.Join(err, n.awaitDaemon(), os.Remove(armed))
	fired, readErr := os.ReadFile(done)
	return len(bytes.Fields(fired)) / 2, errors.Join(err, readErr, os.Remove(done))
}

// awaitDaemon returns when a daemon answers that was started after the last one died.
func (n *node) awaitDaemon() error {
	deadline := time.Now().Add(patience)
	for {
		_, err := n.runtime.Version(n.context(), &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(time.Millisecond) // the connection of the last daemon was not yet known to be broken
	}
}

var pointForm = regexp.MustCompile(`crash\.Point\("([^"]+)"\)`)

// pointsInSource lists the names in the source of the daemon.
func pointsInSource(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, folder := range []string{"cmd", "pod", "ctr", "netslirp", "images", "cgroupv2"} {
		err := filepath.WalkDir(filepath.Join("..", "..", folder), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") {
				return err
			}
			raw, err := os.ReadFile(path)
			for _, found := range pointForm.FindAllSubmatch(raw, -1) {
				names = append(names, string(found[1]))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) < 10 {
		t.Fatalf("the source has the points %q only", names)
	}
	return names
}

// TestShippedProgramHasNoPoints: a name that is in the program for tests is not in the one that is shipped.
func TestShippedProgramHasNoPoints(t *testing.T) {
	programs := map[string][]byte{}
	for _, dir := range []string{shipped, withPoints} {
		raw, err := os.ReadFile(filepath.Join(dir, "coracle"))
		if err != nil {
			t.Fatal(err)
		}
		programs[dir] = raw
	}
	for _, name := range append(pointsInSource(t), "CORACLE_CRASH") {
		if !bytes.Contains(programs[withPoints], []byte(name)) {
			t.Errorf("%s is not in the program with points", name)
		}
		if bytes.Contains(programs[shipped], []byte(name)) {
			t.Errorf("%s is in the program without points", name)
		}
	}
}
