package pod

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// TestFullDirectories: in each directory that the daemon writes to, bytes, inodes or the user's quota run out. What cannot be made is refused
// with a word on where, and leaves nothing; what runs is stopped and removed; with room it works again.
func TestFullDirectories(t *testing.T) {
	for _, sub := range []string{"data/pods", "data/containers", "run/pods", "run/containers"} {
		for _, options := range []string{"size=256k,nr_inodes=10000", "size=8m,nr_inodes=120", nstest.UserQuota} {
			t.Run(sub+" "+options, func(t *testing.T) {
				h := newHarness(t)
				dir := filepath.Join(filepath.Dir(h.cfg.DataDir), sub)
				nstest.Small(t, dir, options)
				says := "make room"
				if options == nstest.UserQuota {
					says = "your quota on"
				}
				t.Cleanup(h.removeAll) // while what it is in is mounted
				pod := h.run(h.podConfig("a"))
				first := h.launchIn(pod, "first", "exec sleep 1000")
				second := h.create(pod, shell("second", "exit 7"))
				free := nstest.Fill(t, dir)
				before := h.facts()
				var err error
				if strings.HasSuffix(sub, "containers") {
					_, err = h.tryCreate(pod, shell("third", "exit 0"))
				} else {
					_, err = h.tryRun(h.podConfig("b"))
				}
				if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), says) {
					t.Errorf("error = %v", err)
				}
				if after := h.facts(); after != before {
					t.Errorf("before %s\nafter %s", before, after)
				}
				// A start is a fact, and so is an end.
				h.start(second)
				if st := h.exited(second); st.ExitCode != 7 {
					t.Errorf("exit code %d", st.ExitCode)
				}
				h.stop(first, 0)
				h.exited(first)
				h.removeAll()
				free()
				h.launchIn(h.run(h.podConfig("c")), "again", "exec sleep 1000")
			})
		}
	}
}

// facts are the names of all that there is below the node's directories.
func (h *harness) facts() string {
	h.t.Helper()
	var all []string
	for _, root := range []string{h.cfg.DataDir, h.cfg.RuntimeDir} {
		err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
			all = append(all, path)
			return err
		})
		if err != nil {
			h.t.Fatal(err)
		}
	}
	return strings.Join(all, " ")
}
