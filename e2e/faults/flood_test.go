package faults

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// floodLine is what a container prints after a number of six columns and a tab: with that and a newline 100 bytes.
var floodLine = strings.Repeat("all work and no play makes jack a dull boy ", 3)[:92]

// TestLogFlood has a container write 1 GB of numbered lines, as fast as it can, while its log is rotated as by a kubelet:
// no line is lost, doubled or out of order, and the keeper needs no more memory than for a few of them.
func TestLogFlood(t *testing.T) {
	count := 10_000_000
	if testing.Short() {
		count = 200_000
	}
	n := up(t, shipped)
	image := n.pullBusybox()
	keeper, err := n.keeper()
	if err != nil {
		t.Fatal(err)
	}
	small := kib(t, keeper, "status", "VmHWM")
	began := time.Now()
	pod, id, err := n.run("floods", image, fmt.Sprintf("yes '%s' | head -n %d | cat -n", floodLine, count))
	if err != nil {
		t.Fatal(err)
	}
	reader := &floodReader{t: t, dir: n.path("work", "logs", "floods")}
	for rotated := 0; ; {
		status, err := n.runtime.ContainerStatus(n.context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		if status.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			if status.Status.ExitCode != 0 {
				t.Fatalf("the container ended with %d: %s", status.Status.ExitCode, status.Status.Message)
			}
			break
		}
		if info, err := os.Stat(reader.current()); err == nil && info.Size() > 64<<20 {
			rotated++
			n.rotate(id, reader, rotated)
		}
		time.Sleep(20 * time.Millisecond)
	}
	took := time.Since(began)
	reader.read(reader.current())
	if reader.lines != count {
		t.Errorf("the log has %d lines of %d", reader.lines, count)
	}
	large := kib(t, keeper, "status", "VmHWM")
	t.Logf("%d lines of 100 bytes in %s: %.0f MB/s; the keeper's largest size was %d KiB, before %d",
		count, took.Round(time.Millisecond), float64(count)*100/1e6/took.Seconds(), large, small)
	if large > small+32<<10 {
		t.Errorf("the keeper grew from %d to %d KiB", small, large)
	}
	if _, err := n.runtime.RemovePodSandbox(n.context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
}

// rotate does what a kubelet does: it renames the file and has the runtime go on in a new one. Then nobody writes to
// the old one any more.
func (n *node) rotate(id string, r *floodReader, number int) {
	n.t.Helper()
	old := fmt.Sprintf("%s.%d", r.current(), number)
	if err := os.Rename(r.current(), old); err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.runtime.ReopenContainerLog(n.context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		// The container may have ended just now.
		status, serr := n.runtime.ContainerStatus(n.context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if serr != nil || status.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			n.t.Fatal(errors.Join(err, serr))
		}
		if err := os.Rename(old, r.current()); err != nil {
			n.t.Fatal(err)
		}
		return
	}
	r.read(old)
}

// floodReader counts the lines of one log's files, which it removes.
type floodReader struct {
	t     *testing.T
	dir   string
	lines int
}

func (r *floodReader) current() string { return filepath.Join(r.dir, "c.log") }

func (r *floodReader) read(path string) {
	r.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		r.lines++
		// TIME stdout F, spaces, the number, a tab, the text
		_, rest, _ := bytes.Cut(s.Bytes(), []byte(" stdout F "))
		number, text, _ := bytes.Cut(rest, []byte{'\t'})
		if got, err := strconv.Atoi(string(bytes.TrimSpace(number))); err != nil || got != r.lines || string(text) != floodLine {
			r.t.Fatalf("line %d of the log is %q", r.lines, s.Text())
		}
	}
	if err := errors.Join(s.Err(), os.Remove(path)); err != nil {
		r.t.Fatal(err)
	}
}
