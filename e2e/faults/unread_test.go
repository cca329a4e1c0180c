package faults

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestUnread has clients that never read what they have asked for, an exec of a program that prints without end, an attach to
// one and a stream of events: pods go on to be made, executed in, logged and removed, and when the clients are gone
// nothing of them is left.
func TestUnread(t *testing.T) {
	n := up(t, shipped)
	image := n.pullBusybox()
	_, quiet, err := n.run("quiet", image, "exec sleep 10000")
	if err != nil {
		t.Fatal(err)
	}
	// Some thousand lines a second: more than any buffer on the way to a client holds within the test.
	_, talks, err := n.run("talks", image, "while :; do seq 1 1000; sleep 0.05; done")
	if err != nil {
		t.Fatal(err)
	}
	n.churn(image, 0, 10) // the daemon keeps some connections to who publishes ports
	before := n.settled(nil)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if _, err := n.runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{}); err != nil {
		t.Fatal(err)
	}
	clients := []*exec.Cmd{n.unreadCrictl("exec", quiet, "yes"), n.unreadCrictl("exec", "--transport", "websocket", quiet, "yes"),
		n.unreadCrictl("attach", talks), n.unreadCrictl("attach", "--transport", "websocket", talks)}
	eventually(t, "the commands print", func() error {
		if err := n.says(n.context(), quiet, "2", "sh", "-c", "ps | grep -c '[y]es$'"); err != nil {
			return err
		}
		return nil
	})

	logged := n.logSize("talks")
	pods := 60
	if testing.Short() {
		pods = 12
	}
	began := time.Now()
	n.churn(image, 10, pods)
	t.Logf("%d pods beside clients that do not read: %s", pods, time.Since(began).Round(time.Millisecond))
	if err := n.says(n.context(), talks, "talks", "hostname"); err != nil {
		t.Error(err)
	}
	eventually(t, "the container that nobody reads goes on to log", func() error {
		if now := n.logSize("talks"); now < logged+1<<20 {
			return fmt.Errorf("its log has %d bytes, and had %d", now, logged)
		}
		return nil
	})

	cancel()
	for _, c := range clients {
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	for _, d := range n.settled(before).differences(before) {
		t.Errorf("after the clients have gone there are other %s", d)
	}
}

func (n *node) logSize(pod string) int64 {
	n.t.Helper()
	info, err := os.Stat(n.path("work", "logs", pod, "c.log"))
	if err != nil {
		n.t.Fatal(err)
	}
	return info.Size()
}

// unreadCrictl starts crictl with a pipe that nobody reads, so that it stops to read in its turn.
func (n *node) unreadCrictl(args ...string) *exec.Cmd {
	n.t.Helper()
	config := n.path("crictl.yaml") // and no file of the machine's
	if err := os.WriteFile(config, []byte("timeout: 60\n"), 0o600); err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(crictl, args...)
	cmd.Env = append(append([]string{}, n.env...), "CONTAINER_RUNTIME_ENDPOINT=unix://"+n.socket(), "CRI_CONFIG_FILE="+config)
	read, write, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = write, os.Stderr
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	write.Close()
	n.t.Cleanup(func() {
		read.Close()
		_ = cmd.Process.Kill()
	})
	return cmd
}
