package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coracle-cri/coracle/e2e/box"
	"github.com/coracle-cri/coracle/e2e/fixture"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

// TestFullDisk: images, state, runtime directory and logs of a node are on one small filesystem, which is full. What needs
// room is refused with a word on where and what to do; what runs runs on, loses lines of its log, which the keeper's log
// tells, and can be stopped and removed; when there is room all works again.
func TestFullDisk(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{SmallTmp: "size=32m,nr_inodes=8000"})
		return
	}
	fullDisk(t, newHome)
}

// TestQuota is the same where it is not the disk that is full, but the user's quota. The runtime directory is in memory, as
// /run/user is, and so is the node's log, which would find no room to say why.
func TestQuota(t *testing.T) {
	if !box.Inside() {
		tmp, err := os.MkdirTemp(nstest.QuotaDir(t), "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := box.RemoveAll(tmp); err != nil {
				t.Error(err)
			}
			nstest.Settle(t, filepath.Dir(tmp))
		})
		box.Run(t, box.Host{Tmp: tmp})
		return
	}
	fullDisk(t, newHomeInMemory)
}

// newHomeInMemory is a home whose runtime directory is a symbolic link to one in memory, as is the log of its first node.
func newHomeInMemory(t *testing.T) *home {
	t.Helper()
	h := newHome(t)
	run, err := os.MkdirTemp("/dev/shm", "ce-")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.Remove(h.path("run")), os.Symlink(run, h.path("run")), os.Symlink(filepath.Join(run, "node.log"), h.path("node-default-1.log")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
	})
	return h
}

// TestRuntimeDirectoryByALink: a node starts where XDG_RUNTIME_DIR is an absolute symbolic link.
func TestRuntimeDirectoryByALink(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{})
		return
	}
	newHomeInMemory(t).up("default").crictl("pods")
}

func fullDisk(t *testing.T, newHome func(*testing.T) *home) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image, other := pushBusybox(t, registry), pushText(t, registry, "tests/other:1")
	n := newHome(t).up("default")
	n.crictl("pull", image)
	pod, file := n.runPod("stays", nil)
	count := n.start(pod, file, "count", image, shell("i=0; while :; do i=$((i+1)); echo line $i; echo $i >/dev/shm/count; usleep 2000; done"))
	ends := n.start(pod, file, "ends", image, shell("while [ ! -e /dev/shm/end ]; do usleep 2000; done; exit 7"))
	counted := func() int {
		var said string
		for said == "" { // it is being written
			said = strings.TrimSpace(n.exec(count, "cat", "/dev/shm/count"))
		}
		i, err := strconv.Atoi(said)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	second, third := n.podConfig("second", nil), n.containerConfig("third", image, nil)
	n.crictlConfig()

	free := nstest.Fill(t, "/tmp")
	for _, c := range []struct {
		says string
		args []string
	}{
		{"crictl rmi", []string{"pull", other}}, {"on the filesystem of", []string{"runp", second}}, {"room", []string{"create", pod, third, file}},
	} {
		r := n.try(c.args...)
		if r.code == 0 || !strings.Contains(r.errs, "ResourceExhausted") || !strings.Contains(r.errs, c.says) || !strings.Contains(r.errs, n.dir) {
			t.Errorf("crictl %s on a full disk: exit code %d\n%s%s", c.args[0], r.code, r.out, r.errs)
		}
	}
	if images, pods := n.crictl("images", "-q"), n.crictl("pods", "-q"); strings.Count(images, "\n") > 0 || pods != pod {
		t.Errorf("images %s, pods %s", images, pods)
	}
	signal(t, n.daemon(), syscall.SIGKILL) // another one comes up on a full disk
	eventually(t, 10*time.Second, "exec works again", func() error {
		if r := n.try("exec", count, "true"); r.code != 0 {
			return errors.New(r.errs)
		}
		return nil
	})
	before := counted()
	eventually(t, 10*time.Second, "the container goes on", func() error {
		if now := counted(); now < before+100 {
			return fmt.Errorf("it has counted from %d to %d", before, now)
		}
		return nil
	})
	n.exec(count, "touch", "/dev/shm/end")
	n.expectExit(ends, 7)
	n.crictl("rm", ends)
	// That has made some room, in which lines may go: a word on them would find none itself, as the node's log is there too.
	eventually(t, 10*time.Second, "the log is full again", func() error {
		size, from := logSize(t, n.path("work", "logs-default-stays", "count.log")), counted()
		for counted() < from+100 {
			time.Sleep(5 * time.Millisecond)
		}
		if now := logSize(t, n.path("work", "logs-default-stays", "count.log")); now != size {
			return fmt.Errorf("it has grown from %d to %d bytes", size, now)
		}
		return nil
	})
	eventually(t, 10*time.Second, "the loss of lines is told when there is room", func() error {
		if free != nil {
			free()
			free = nil
		}
		if logged := n.logged(); !strings.Contains(logged, "container log can be written again") || !strings.Contains(logged, "dropped_bytes=") {
			return fmt.Errorf("the node's log ends with:\n%s", tail(logged, 10))
		}
		return nil
	})
	n.crictl("pull", other)
	n.crictl("runp", second)
	n.crictl("create", pod, third, file)
	now := counted()
	eventually(t, 10*time.Second, "the log goes on", func() error {
		if logs := n.crictl("logs", "--tail", "1", count); strings.TrimPrefix(logs, "line ") < "0" || !strings.Contains(n.crictl("logs", count), fmt.Sprintf("line %d\n", now+1)) {
			return fmt.Errorf("its last line is %q", logs)
		}
		return nil
	})
	n.crictl("rmp", "-af")
	n.crictl("rmi", "-a")
}

func logSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// TestRemovingOnAFullDisk: a pod that runs is removed, and then its image, while there is no room; that makes some.
func TestRemovingOnAFullDisk(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{SmallTmp: "size=32m,nr_inodes=8000"})
		return
	}
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("goes", nil)
	n.start(pod, file, "web", image, nil)
	n.crictlConfig()
	free := nstest.Fill(t, "/tmp")
	n.crictl("stopp", pod)
	n.crictl("rmp", pod)
	n.crictl("rmi", image)
	n.crictl("pull", image)
	free()
}

// expectExit waits for the end of a container.
func (n *node) expectExit(id string, code int) {
	n.t.Helper()
	eventually(n.t, 10*time.Second, "the container has ended", func() error {
		if st := n.inspect("inspect", id); st.text("state") != "CONTAINER_EXITED" || st.text("exitCode") != strconv.Itoa(code) {
			return fmt.Errorf("it is %s, exit code %s", st.text("state"), st.text("exitCode"))
		}
		return nil
	})
}

// pushText puts an image with one small file into a registry.
func pushText(t *testing.T, r *fixture.Registry, name string) string {
	t.Helper()
	w, err := fixture.NewLayerWriter(fixture.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(fixture.Text("etc/motd", "another image\n")); err != nil {
		t.Fatal(err)
	}
	layer, err := w.Layer()
	if err != nil {
		t.Fatal(err)
	}
	img, err := fixture.Image(v1.Config{}, layer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Push(context.Background(), name, img); err != nil {
		t.Fatal(err)
	}
	return r.Addr + "/" + name
}

// TestUpOnAFullDisk: a node that cannot start says why, and leaves nothing; one that is not up is told to be so.
func TestUpOnAFullDisk(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{SmallTmp: "size=16m,nr_inodes=4000"})
		return
	}
	h := newHome(t)
	h.up("default").down()
	free := nstest.Fill(t, "/tmp")
	if r := h.coracle("down"); r.code != 0 || !strings.Contains(r.out, "is not up") {
		t.Errorf("coracle down on a full disk: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	if r := h.coracle("up"); r.code == 0 || !strings.Contains(r.errs, "no space left on device") {
		t.Errorf("coracle up on a full disk: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	free()
	h.up("default")
}
