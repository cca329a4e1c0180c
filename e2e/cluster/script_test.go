package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// second runs scripts/cluster for another cluster than the tests', and returns what it printed on both streams.
func second(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join("..", "..", "scripts", "cluster"), args...)
	var out bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = the.env, &out, &out, 5*time.Second
	err := cmd.Run()
	return out.String(), err
}

func refused(t *testing.T, text string, args ...string) {
	t.Helper()
	if out, err := second(args...); err == nil || !strings.Contains(out, text) {
		t.Errorf("scripts/cluster %s: %v, without %q:\n%s", strings.Join(args, " "), err, text, out)
	}
}

func done(t *testing.T, args ...string) string {
	t.Helper()
	out, err := second(args...)
	if err != nil {
		t.Fatalf("scripts/cluster %s: %v:\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TestScriptRefuses what cannot be, before anything is made or removed.
func TestScriptRefuses(t *testing.T) {
	refused(t, "is up already", "up", "--name", name, "--bin", programs)
	refused(t, "want at most 27", "down", "--name", "../e2e")
	refused(t, "want at most 27", "up", "--name", "Capital")
	refused(t, "wants a value", "up", "--port")
	refused(t, "--port x: want a number", "up", "--port", "x")
	refused(t, "--port 99999: want a number from 1", "up", "--port", "99999")
	refused(t, "--bin: there is no such folder", "up", "--bin", "/nonesuch")
	refused(t, "unknown", "up", "surplus")
	refused(t, "which one? etcd kube-apiserver", "restart", "--name", name, "nothing")
	refused(t, "there is no cluster; to start one, run: ../../scripts/cluster up --name never\n", "status", "--name", "never")
	refused(t, "there is no cluster", "kubeconfig", "--name", "never")
	want(t, done(t, "down", "--name", "never"), "there is no cluster never")
	want(t, done(t, "status", "--name", name), "etcd runs\n", "kubelet runs\n", "node-ports runs\n", node)
	if got, err := os.ReadFile(the.kubeconfig); err != nil || done(t, "kubeconfig", "--name", name) != string(got) {
		t.Errorf("scripts/cluster kubeconfig prints another one: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(the.dir, "*", "coracle-kube-[^e]*")); len(left) > 0 {
		t.Errorf("directories were made: %v", left)
	}
}

// TestSecondCluster: one beside the tests' own shares nothing with it but the host's ports; a port that is taken is told;
// a cluster that is kept comes back with its objects, at its port; one that was ended is gone.
func TestSecondCluster(t *testing.T) {
	const other = "second"
	t.Cleanup(func() { done(t, "down", "--name", other) })
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(taken.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "address already in use", "up", "--name", other, "--bin", programs, "--port", port)
	if out, err := the.coracle("enter", "--name", "kube-"+other, "--", "true"); err == nil {
		t.Errorf("the node of the cluster that did not come up is up: %s", out)
	}
	if _, err := os.Stat(filepath.Join(the.dir, "data", "coracle-kube-"+other)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cluster that did not come up has left a directory: %v", err)
	}
	refused(t, "this is not true yet: the API server answers", "up", "--name", other, "--bin", programs, "--timeout", "0")
	done(t, "down", "--name", other)
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	done(t, "up", "--name", other, "--bin", programs, "--port", port)
	config := filepath.Join(the.dir, "data", "coracle-kube-"+other, "cluster", "pki", "admin.kubeconfig")
	in := func(args ...string) string { return kubectl(t, append([]string{"--kubeconfig", config}, args...)...) }
	want(t, in("get", "nodes"), "kube-"+other+" ")
	in("create", "configmap", "kept", "--from-literal", "a=b")

	// Both ask for one port of the host, of those that no service is given without asking.
	kubectl(t, "create", "service", "nodeport", "contested", "--tcp", "80", "--node-port", "30042")
	t.Cleanup(func() { kubectl(t, "delete", "service", "contested") })
	eventually(t, "the node port is published", func() error {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:30042", time.Second)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	in("create", "service", "nodeport", "contested", "--tcp", "80", "--node-port", "30042")
	eventually(t, "the other cluster says that it is taken", func() error {
		out := in("get", "events", "--field-selector", "involvedObject.name=contested")
		if !strings.Contains(out, "NodePortNotPublished") || !strings.Contains(out, "address already in use") {
			return fmt.Errorf("events: %s", out)
		}
		return nil
	})

	done(t, "down", "--keep", "--name", other)
	refused(t, "is kept, but not up", "status", "--name", other)
	done(t, "up", "--name", other, "--bin", programs)
	want(t, in("get", "configmap", "kept", "-o", "jsonpath={.data.a}"), "b")
	want(t, in("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"), "https://127.0.0.1:"+port)
}
