package cluster

import (
	"os"
	"path/filepath"
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
