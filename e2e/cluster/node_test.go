package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestNode(t *testing.T) {
	version, err := the.coracle("version")
	if err != nil {
		t.Fatal(err)
	}
	described := kubectl(t, "describe", "node", node)
	want(t, described, "coracle://"+strings.Fields(version)[1], "InternalIP:  10.0.2.100", "Hostname:    "+node)
	field := func(path string) string { return kubectl(t, "get", "node", node, "-o", "jsonpath="+path) }
	if got := field(`{.status.conditions[?(@.type=="Ready")].status}`); got != "True" {
		t.Errorf("the node's condition Ready is %q", got)
	}
	client := kubectl(t, "version", "--client")
	if got := field("{.status.nodeInfo.kubeletVersion}"); !strings.HasPrefix(got, "v1.") || !strings.Contains(client, "Client Version: "+got+"\n") {
		t.Errorf("the kubelet's version is %q, and kubectl says %q", got, client)
	}
	for _, pressure := range []string{"DiskPressure", "MemoryPressure", "PIDPressure"} {
		if got := field(`{.status.conditions[?(@.type=="` + pressure + `")].status}`); got != "False" {
			t.Errorf("%s is %q", pressure, got)
		}
	}
}

func TestSecretsAreTheUsers(t *testing.T) {
	root := filepath.Join(the.dir, "data", "coracle-"+node)
	for _, dir := range []string{root, filepath.Join(root, "cluster"), filepath.Join(root, "cluster", "pki")} {
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o700 {
			t.Errorf("%s has the mode %o", dir, info.Mode().Perm())
		}
	}
	files, err := os.ReadDir(filepath.Join(root, "cluster", "pki"))
	if err != nil || len(files) < 20 {
		t.Fatalf("the cluster's keys: %d files, %v", len(files), err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
	// RBAC is on: an account without a role may do nothing.
	if out, err := try("auth", "can-i", "list", "secrets", "--as=system:serviceaccount:default:default"); err == nil {
		t.Errorf("the default account may list secrets: %s", out)
	}
}

func TestStaticPod(t *testing.T) {
	dir := filepath.Join(the.dir, "data", "coracle-"+node, "kubelet", "manifests")
	manifest := strings.Replace(pod("static", "sleep 1000", ""), "IMAGE", the.busybox, 1)
	file := filepath.Join(dir, "static.yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(file) })
	s := &space{t: t, name: "default"}
	s.eventually("the kubelet has told of the static pod", func() error {
		_, err := s.try("get", "pod", "static-"+node)
		return err
	})
	s.ready("static-" + node)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s.kubectl("wait", "pod/static-"+node, "--for=delete", "--timeout="+patience.String())
}

// summary is what matters here of the kubelet's /stats/summary.
type summary struct {
	Node struct {
		Fs struct {
			CapacityBytes uint64 `json:"capacityBytes"`
		} `json:"fs"`
		Runtime struct {
			ImageFs struct {
				CapacityBytes  uint64 `json:"capacityBytes"`
				AvailableBytes uint64 `json:"availableBytes"`
				UsedBytes      uint64 `json:"usedBytes"`
			} `json:"imageFs"`
		} `json:"runtime"`
	} `json:"node"`
	Pods []struct {
		PodRef struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"podRef"`
		Containers []struct {
			Name   string `json:"name"`
			Rootfs struct {
				UsedBytes uint64 `json:"usedBytes"`
			} `json:"rootfs"`
			Logs struct {
				UsedBytes uint64 `json:"usedBytes"`
			} `json:"logs"`
			CPU struct {
				UsageCoreNanoSeconds uint64 `json:"usageCoreNanoSeconds"`
			} `json:"cpu"`
		} `json:"containers"`
	} `json:"pods"`
}

// TestStats: what a pod has written to its root file system and to its log, and what time it has spent, is in the
// kubelet's statistics, and the file system of the images is the disk's.
func TestStats(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	const wrote = 5 << 20
	s.apply(pod("busy", fmt.Sprintf("dd if=/dev/zero of=/file bs=1M count=%d 2>/dev/null; i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done; sleep 1000", wrote>>20), ""))
	s.ready("busy")
	var spent uint64
	s.eventually("the pod's statistics are told", func() error {
		var sum summary
		if err := json.Unmarshal([]byte(kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/stats/summary")), &sum); err != nil {
			return err
		}
		images := sum.Node.Runtime.ImageFs
		if images.CapacityBytes == 0 || images.AvailableBytes == 0 || images.UsedBytes == 0 || images.CapacityBytes != sum.Node.Fs.CapacityBytes {
			return fmt.Errorf("the images' file system is %+v, the node's %+v", images, sum.Node.Fs)
		}
		for _, p := range sum.Pods {
			if p.PodRef.Namespace != s.name || len(p.Containers) != 1 {
				continue
			}
			c := p.Containers[0]
			if c.Rootfs.UsedBytes < wrote || c.Rootfs.UsedBytes > 2*wrote || c.Logs.UsedBytes < 1000*20 {
				return fmt.Errorf("the container has %+v", c)
			}
			spent = c.CPU.UsageCoreNanoSeconds
			return nil
		}
		return fmt.Errorf("there is no pod of %s among %d", s.name, len(sum.Pods))
	})
	number := func(endpoint, metric string) float64 {
		t.Helper()
		text := kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/"+endpoint)
		found := regexp.MustCompile(metric + `\{[^}]*namespace="` + s.name + `"[^}]*\} ([0-9.e+-]+)`).FindStringSubmatch(text)
		if found == nil {
			t.Fatalf("/metrics/%s tells no %s of the pod", endpoint, metric)
		}
		n, err := strconv.ParseFloat(found[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if got := number("cadvisor", "container_fs_usage_bytes"); got < wrote || got > 2*wrote {
		t.Errorf("/metrics/cadvisor tells %.0f bytes, the container has written %d", got, wrote)
	}
	if spent == 0 {
		t.Skip("this host delegates no cgroup: the kernel does not count the pod's time")
	}
	if got := number("resource", "container_cpu_usage_seconds_total"); got <= 0 {
		t.Errorf("/metrics/resource tells %f seconds", got)
	}
}
