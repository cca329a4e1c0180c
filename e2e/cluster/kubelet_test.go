package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// alone is a node that has no cluster.
const alone = "alone"

// upAlone starts that node; nothing of it is left after the test.
func upAlone(t *testing.T) (data string) {
	t.Helper()
	if _, err := the.coracle("up", "--detach", "--name", alone); err != nil {
		t.Fatal(err)
	}
	data = filepath.Join(the.dir, "data", "coracle-"+alone)
	t.Cleanup(func() {
		for _, args := range [][]string{{"rmp", "-af"}, {"rmi", "-a"}} {
			if _, err := crictlOf(alone, args...); err != nil {
				t.Error(err)
			}
		}
		if _, err := the.coracle("down", "--name", alone); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(data); err != nil {
			t.Error(err)
		}
	})
	return data
}

// kubeletScript is scripts/kubelet for that node.
func kubeletScript(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join("..", "..", "scripts", "kubelet"), append([]string{"--name", alone}, args...)...)
	cmd.Env = the.env
	return cmd
}

var runningByHand = regexp.MustCompile(`(?m)^[0-9a-f]{13} .*Running.*by-hand`)

// runsByHand waits until the kubelet says that its one pod runs, and returns the id of the container.
func runsByHand(t *testing.T) string {
	t.Helper()
	eventually(t, "the kubelet runs the pod", func() error {
		found, err := crictlOf(alone, "ps")
		if err == nil && !runningByHand.MatchString(found) {
			err = fmt.Errorf("there is:\n%s", found)
		}
		if err != nil {
			return err
		}
		pods, err := the.coracle("enter", "--name", alone, "--", "curl", "-sk", "https://127.0.0.1:10250/pods")
		if err == nil && !strings.Contains(pods, `"phase":"Running"`) {
			err = fmt.Errorf("the kubelet says: %s", pods)
		}
		return err
	})
	id, err := crictlOf(alone, "ps", "-q")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestStandaloneKubelet: a kubelet by hand, in a node that is up, runs the pods of a directory, with the configuration
// that is printed beforehand; it ends with what started it, its pods do not, and its successor finds them.
func TestStandaloneKubelet(t *testing.T) {
	data, manifests := upAlone(t), t.TempDir()
	manifest := strings.Replace(pod("by-hand", "sleep 1000", ""), "IMAGE", the.busybox, 1)
	if err := os.WriteFile(filepath.Join(manifests, "pod.yaml"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mistyped := range [][]string{{"--kubelet", "/nonesuch"}, {"--manifests", filepath.Join(manifests, "nonesuch")}} {
		if out, err := kubeletScript(mistyped...).CombinedOutput(); err == nil || !strings.Contains(string(out), "there is no ") {
			t.Errorf("scripts/kubelet %v: %v, says: %s", mistyped, err, out)
		}
	}
	printed, err := kubeletScript("--manifests", manifests, "--print").Output()
	if err != nil {
		t.Fatal(err)
	}
	want(t, string(printed), "KubeletInUserNamespace: true", `staticPodPath: "`+manifests+`"`, "cgroupDriver: cgroupfs", "cgroupsPerQOS: ")

	var first string
	for range 2 {
		kubelet := kubeletScript("--manifests", manifests, "--kubelet", filepath.Join(programs, "kubelet"))
		if err := kubelet.Start(); err != nil {
			t.Fatal(err)
		}
		id := runsByHand(t)
		if first == "" {
			first = id
		}
		if id != first || len(strings.Fields(id)) != 1 {
			t.Errorf("the containers are %q, those of the first kubelet were %q", id, first)
		}
		if err := kubelet.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		_ = kubelet.Wait()
		eventually(t, "the kubelet ends with what started it", func() error {
			if out, err := the.coracle("enter", "--name", alone, "--", "sh", "-c", "grep -lsx kubelet /proc/[0-9]*/comm"); err == nil {
				return fmt.Errorf("it is process %s", out)
			}
			return nil
		})
		written, err := os.ReadFile(filepath.Join(data, "kubelet", "config.yaml"))
		if err != nil || string(written) != string(printed) {
			t.Errorf("the configuration is not what was printed: %v\n%s", err, written)
		}
	}
}
