package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// rootfulPrograms is the directory of containerd and runc.
var rootfulPrograms = os.Getenv("CORACLE_E2E_ROOTFUL")

// rootful is a kubelet as everybody runs it, as root, on containerd and runc: what a node's cgroups are compared with. It
// has no network plugin, so its pods are of the host's network.
type rootful struct {
	dir       string
	manifests string
}

const containerdSettings = `version = 3
root = '%[1]s/lib'
state = '%[1]s/state'
[grpc]
address = '%[1]s/containerd.sock'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '%[2]s'
[plugins.'io.containerd.cri.v1.runtime'.cni]
conf_dir = '%[1]s/cni'
`

const rootfulKubelet = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%[1]s/containerd.sock
staticPodPath: %[1]s/manifests
cgroupDriver: cgroupfs
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
address: 127.0.0.1
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
readOnlyPort: 0
failSwapOn: false
evictionHard: {memory.available: 100Mi, nodefs.available: 1Mi, imagefs.available: 1Mi}
`

// startRootful starts both, by sudo.
func startRootful(t *testing.T) *rootful {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cr-")
	if err != nil {
		t.Fatal(err)
	}
	r := &rootful{dir: dir}
	t.Cleanup(func() {
		if out, err := exec.Command("sudo", "rm", "-rf", "--one-file-system", dir).CombinedOutput(); err != nil {
			t.Logf("%v: %s", err, out)
		}
	})
	r.manifests = filepath.Join(r.dir, "manifests")
	if err := os.MkdirAll(r.manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	pause := pushPause(t)
	for name, text := range map[string]string{"containerd.toml": fmt.Sprintf(containerdSettings, r.dir, pause),
		"kubelet.yaml": fmt.Sprintf(rootfulKubelet, r.dir) + qosSettings} {
		if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.start(t, "containerd", filepath.Join(rootfulPrograms, "containerd"), "--config", r.dir+"/containerd.toml")
	eventually(t, "containerd answers", func() error { _, err := r.crictl("version"); return err })
	r.start(t, "kubelet", filepath.Join(programs, "kubelet"), "--config", r.dir+"/kubelet.yaml", "--root-dir", r.dir+"/kubelet",
		"--cert-dir", r.dir+"/pki", "--hostname-override", "rootful")
	t.Cleanup(func() { r.end(t) })
	return r
}

// pushPause fills the registry with an image that does nothing.
func pushPause(t *testing.T) string {
	t.Helper()
	base, err := fixture.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	pause, err := mutate.Config(base, v1.Config{Entrypoint: []string{"/bin/sleep", "1000000"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := the.registry.Push(context.Background(), "tests/pause:1", pause); err != nil {
		t.Fatal(err)
	}
	return the.registry.Addr + "/tests/pause:1"
}

// start runs a program as root until the test ends; its output is kept in the logs of the machine.
func (r *rootful) start(t *testing.T, name, program string, args ...string) {
	t.Helper()
	logs := os.Getenv("VM_LOGS")
	if logs == "" {
		logs = r.dir
	}
	log, err := os.Create(filepath.Join(logs, "rootful-"+name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sudo", append([]string{"env", "PATH=" + rootfulPrograms + ":/usr/sbin:/usr/bin:/sbin:/bin", program}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// sudo passes the signal on.
		_ = exec.Command("sudo", "kill", fmt.Sprint(cmd.Process.Pid)).Run()
		_ = cmd.Wait()
		_ = log.Close()
	})
}

func (r *rootful) crictl(args ...string) (string, error) {
	endpoint := "unix://" + r.dir + "/containerd.sock"
	cmd := exec.Command("sudo", append([]string{crictl, "--timeout", patience.String(), "--runtime-endpoint", endpoint, "--image-endpoint", endpoint}, args...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return string(out), nil
}

// end stops the pods: their manifests go, and the kubelet does the rest.
func (r *rootful) end(t *testing.T) {
	entries, err := os.ReadDir(r.manifests)
	for _, e := range entries {
		err = errors.Join(err, os.Remove(filepath.Join(r.manifests, e.Name())))
	}
	if err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Second) {
		if pods, err := r.crictl("pods", "-q", "--state", "ready"); err == nil && strings.TrimSpace(pods) == "" {
			return
		}
	}
	t.Log("the rootful kubelet's pods go on")
}

// running are the containers that run, by their ids: their pod's uid and name.
func running(list string) (map[string]string, error) {
	var all struct {
		Containers []struct {
			ID     string            `json:"id"`
			State  string            `json:"state"`
			Labels map[string]string `json:"labels"`
		} `json:"containers"`
	}
	if err := json.Unmarshal([]byte(list), &all); err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, c := range all.Containers {
		if c.State == "CONTAINER_RUNNING" {
			found[c.ID] = c.Labels["io.kubernetes.pod.uid"] + "/" + c.Labels["io.kubernetes.container.name"]
		}
	}
	return found, nil
}
