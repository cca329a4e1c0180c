package pod

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestLogDirectoriesAreNotMadeThroughLinks: a container that has the pod's log directory as a volume puts a link there before
// another one of the pod is started. Nothing is made where it leads, and the kubelet is told that it is the node's state.
func TestLogDirectoriesAreNotMadeThroughLinks(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	outside := t.TempDir()
	logs := filepath.Join(h.logs, "p")
	for link, path := range map[string]string{"app": "app/0.log", "deep": "deep/er/and/0.log", "dir/deep": "dir/deep/er/0.log"} {
		config := shell(filepath.Base(filepath.Dir(path)), "true")
		config.LogPath = path
		id := h.create(pod, config)
		at := filepath.Join(logs, link)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), os.Symlink(outside, at)); err != nil {
			t.Fatal(err)
		}
		_, err := h.StartContainer(h.ctx(), &runtimeapi.StartContainerRequest{ContainerId: id})
		wantCode(t, err, codes.FailedPrecondition)
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
		t.Errorf("outside of the log directory: %v, %v", entries, err)
	}
	config := shell("good", "true")
	config.LogPath = "of/several/parts/0.log"
	id := h.create(pod, config)
	h.start(id)
	if st := h.exited(id); st.GetLogPath() != filepath.Join(logs, config.LogPath) {
		t.Errorf("log path %s", st.GetLogPath())
	}
}

// TestTheLogDirectoryMayBeALink: how one comes to the sandbox's log directory is the kubelet's business.
func TestTheLogDirectoryMayBeALink(t *testing.T) {
	h := newHarness(t)
	real, link := filepath.Join(h.logs, "real"), filepath.Join(h.logs, "link")
	if err := errors.Join(os.MkdirAll(real, 0o700), os.Symlink(real, link)); err != nil {
		t.Fatal(err)
	}
	config := h.podConfig("p")
	config.LogDirectory = link + "/p/"
	pod := h.run(config)
	id := h.launchIn(pod, "app", "echo hello")
	if st := h.exited(id); st.GetLogPath() != filepath.Join(link, "p/app/0.log") {
		t.Errorf("log path %s", st.GetLogPath())
	}
	if _, err := os.Stat(filepath.Join(real, "p/app/0.log")); err != nil {
		t.Error(err)
	}
}

// TestReopenedLogStaysInItsDirectory: the keeper is told the log directory, and its refusal is FailedPrecondition.
func TestReopenedLogStaysInItsDirectory(t *testing.T) {
	h := newHarness(t)
	pod := h.run(h.podConfig("p"))
	id := h.launchIn(pod, "app", "sleep 1000")
	outside := filepath.Join(h.logs, "other")
	place := filepath.Join(h.logs, "p/app")
	if err := errors.Join(os.Mkdir(outside, 0o700), os.RemoveAll(place), os.Symlink("../other", place)); err != nil {
		t.Fatal(err)
	}
	_, err := h.ReopenContainerLog(h.ctx(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
	wantCode(t, err, codes.FailedPrecondition)
	if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
		t.Errorf("outside of the log directory: %v, %v", entries, err)
	}
}
