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

// TestPoints lets the daemon die at each point that an operation passes. What comes back must know the truth.
func TestPoints(t *testing.T) {
	n := up(t, withPoints)
	image, other := n.pullBusybox(), serveOther(t)
	warm := &stage{node: n, image: image, registry: other}
	if err := errors.Join(running(warm), warm.strike()); err != nil { // the first pod makes directories that stay
		t.Fatal(err)
	}
	before, err := n.census()
	if err != nil {
		t.Fatal(err)
	}
	seen, kills := map[string]bool{}, 0
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			n.t = t
			play := func(act func(*stage) error) error {
				s := &stage{node: n, image: image, registry: other}
				return errors.Join(s.play(op, act), s.strike(), n.same(before))
			}
			var points []string
			err := play(func(s *stage) (err error) {
				points, err = n.trace(func() error { return op.call(s) })
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			for i, point := range points {
				seen[point] = true
				if testing.Short() && i%sample != len(points)%sample {
					continue
				}
				nth := 1 + len(slices.DeleteFunc(slices.Clone(points[:i]), func(p string) bool { return p != point }))
				fired := false
				err := play(func(s *stage) (err error) {
					fired, err = n.dieAt(point, nth, func() error { return op.call(s) })
					return err
				})
				switch {
				case err != nil:
					t.Errorf("SIGKILL at %s, the %d. time: %v", point, nth, err)
				case fired:
					kills++
				default:
					t.Logf("%s was not passed a %d. time", point, nth)
				}
			}
		})
	}
	n.t = t
	t.Logf("the daemon was killed at a point %d times", kills)
	if testing.Short() {
		return
	}
	for _, name := range pointsInSource(t) {
		if !seen[name] {
			t.Errorf("no operation passes the point %s", name)
		}
	}
}

// sample: one in so many points is tried in short.
const sample = 12

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

// dieAt makes a call whose daemon dies when it passes a point for the nth time, and waits for the next daemon. fired is
// false where the point was not passed so often; then the call must have succeeded.
func (n *node) dieAt(point string, nth int, call func() error) (fired bool, err error) {
	armed, done := n.path("faults", "armed"), n.path("faults", "fired")
	if err := os.WriteFile(armed, fmt.Appendf(nil, "%s %d\n", point, nth), 0o600); err != nil {
		return false, err
	}
	callErr := call()
	err = os.Remove(armed)
	_, statErr := os.Stat(done)
	if fired = statErr == nil; !fired {
		return false, errors.Join(callErr, err)
	}
	if callErr != nil && status.Code(callErr) != codes.Unavailable { // what is not of the RPC counts too: its code is Unknown
		err = errors.Join(err, callErr)
	}
	return true, errors.Join(err, os.Remove(done), n.awaitDaemon())
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
