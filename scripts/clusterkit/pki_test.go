package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func testPKI(t *testing.T, dir string) {
	t.Helper()
	err := issueAll(pkiOptions{dir: dir, nodeName: "node", nodeIP: "10.0.2.100", serviceIP: "10.96.0.1",
		inside: "https://10.0.2.100:6443", outside: "https://127.0.0.1:1234"})
	if err != nil {
		t.Fatal(err)
	}
}

func readCertificate(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	der, err := readPEM(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPKI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	testPKI(t, dir)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatal(len(entries), err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", info.Mode(), err)
	}

	roots := x509.NewCertPool()
	roots.AddCert(readCertificate(t, filepath.Join(dir, "ca.crt")))
	server := readCertificate(t, filepath.Join(dir, "apiserver.crt"))
	for _, name := range []string{"127.0.0.1", "10.0.2.100", "10.96.0.1", "kubernetes.default.svc"} {
		if _, err := server.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("the API server's certificate as %s: %v", name, err)
		}
	}
	client := x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := server.Verify(client); err == nil {
		t.Error("the API server's certificate is good for a client")
	}
	kubelet := readCertificate(t, filepath.Join(dir, "kubelet.crt"))
	if _, err := kubelet.Verify(client); err != nil || kubelet.Subject.CommonName != "system:node:node" || kubelet.Subject.Organization[0] != "system:nodes" {
		t.Errorf("the kubelet's certificate: %v, %v", kubelet.Subject, err)
	}
	// etcd obeys whoever its authority has signed: an identity of the cluster must be none there.
	etcd := x509.NewCertPool()
	etcd.AddCert(readCertificate(t, filepath.Join(dir, "etcd-ca.crt")))
	if _, err := kubelet.Verify(x509.VerifyOptions{Roots: etcd, KeyUsages: client.KeyUsages}); err == nil {
		t.Error("etcd takes the kubelet's certificate")
	}
}

// TestPKIAgain: what a kept cluster has in its store and in its pods was signed by the first authority and key.
func TestPKIAgain(t *testing.T) {
	dir := t.TempDir()
	testPKI(t, dir)
	read := func(name string) string {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	stays, changes := []string{"ca.crt", "ca.key", "etcd-ca.crt", "service-accounts.key"}, []string{"apiserver.crt", "admin.key", "admin.kubeconfig"}
	before := map[string]string{}
	for _, name := range append(stays, changes...) {
		before[name] = read(name)
	}
	testPKI(t, dir)
	for _, name := range stays {
		if read(name) != before[name] {
			t.Errorf("%s is another one", name)
		}
	}
	for _, name := range changes {
		if read(name) == before[name] {
			t.Errorf("%s is the same", name)
		}
	}
}

func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	testPKI(t, dir)
	raw, err := os.ReadFile(filepath.Join(dir, "admin.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	var c kubeconfig
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	if got := c.Clusters[0].Cluster.Server; got != "https://127.0.0.1:1234" {
		t.Errorf("server %q", got)
	}
	if block, _ := pem.Decode(c.Users[0].User.Key); block == nil || !strings.Contains(block.Type, "PRIVATE KEY") {
		t.Error("there is no key")
	}
	if _, err := newAPIClient(filepath.Join(dir, "admin.kubeconfig")); err != nil {
		t.Error(err)
	}
}
