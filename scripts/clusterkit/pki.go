package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Lifetimes: an authority's certificate outlives a cluster that is kept; the others are issued anew at each start.
const (
	authorityLife = 10 * 365 * 24 * time.Hour
	identityLife  = 365 * 24 * time.Hour
	clockSkew     = 5 * time.Minute
)

// pkiOptions say for whom a cluster's certificates are.
type pkiOptions struct {
	dir       string
	nodeName  string
	nodeIP    string // where the API server and the kubelet listen, inside the node
	serviceIP string // the address of the service "kubernetes"
	inside    string // URL of the API server as the node's programs reach it
	outside   string // the same from the host
}

func runPKI(_ context.Context, args []string) error {
	var o pkiOptions
	flags := flag.NewFlagSet("pki", flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", "", "where to write")
	flags.StringVar(&o.nodeName, "node", "", "name of the node")
	flags.StringVar(&o.nodeIP, "node-ip", "", "address of the node")
	flags.StringVar(&o.serviceIP, "service-ip", "", "address of the service kubernetes")
	flags.StringVar(&o.inside, "server", "", "URL of the API server, inside the node")
	flags.StringVar(&o.outside, "host-server", "", "URL of the API server, from the host")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return issueAll(o)
}

// identity is what a certificate says of its holder: user and group for a client, names and addresses for a server.
type identity struct {
	file          string // without .crt and .key
	user, group   string
	hosts         []string
	client, kconf bool   // kconf: a kubeconfig for it too
	server        string // of the kubeconfig
}

// issueAll makes what is missing of the authorities, and every identity anew. Whoever may read a key is its holder:
// keys are 0600 and the directory is 0700.
func issueAll(o pkiOptions) error {
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	names := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}
	byAuthority := map[string][]identity{
		"ca": {
			{file: "apiserver", user: "kube-apiserver", hosts: append(names, "127.0.0.1", o.nodeIP, o.serviceIP)},
			{file: "kubelet-server", user: o.nodeName, hosts: []string{o.nodeName, o.nodeIP, "127.0.0.1"}},
			{file: "apiserver-kubelet", user: "kube-apiserver-kubelet-client", client: true},
			{file: "admin", user: "admin", group: "system:masters", client: true, kconf: true, server: o.outside},
			{file: "kubelet", user: "system:node:" + o.nodeName, group: "system:nodes", client: true, kconf: true, server: o.inside},
			{file: "controller-manager", user: "system:kube-controller-manager", client: true, kconf: true, server: o.inside},
			{file: "scheduler", user: "system:kube-scheduler", client: true, kconf: true, server: o.inside},
			{file: "proxy", user: "system:kube-proxy", client: true, kconf: true, server: o.inside},
			{file: "node-ports", user: "coracle:node-ports", client: true, kconf: true, server: o.inside},
		},
		"etcd-ca": {
			{file: "etcd", user: "etcd", hosts: []string{"localhost", "127.0.0.1"}, client: true},
			{file: "apiserver-etcd", user: "kube-apiserver", client: true},
		},
		"front-proxy-ca": {{file: "front-proxy", user: "front-proxy-client", client: true}},
	}
	for name, identities := range byAuthority {
		a, err := openAuthority(o.dir, name)
		if err != nil {
			return err
		}
		for _, id := range identities {
			if err := a.issue(o.dir, id); err != nil {
				return fmt.Errorf("issue certificate %s: %w", id.file, err)
			}
		}
	}
	return makeSigningKey(o.dir)
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// openAuthority reads an authority, or makes it where there is none.
func openAuthority(dir, name string) (*authority, error) {
	path := filepath.Join(dir, name)
	cert, err1 := readPEM(path + ".crt")
	key, err2 := readPEM(path + ".key")
	if errors.Is(err1, fs.ErrNotExist) && errors.Is(err2, fs.ErrNotExist) {
		return makeAuthority(path, name)
	}
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	var a authority
	a.cert, err1 = x509.ParseCertificate(cert)
	a.key, err2 = x509.ParseECPrivateKey(key)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("read authority %s: %w", path, err)
	}
	return &a, nil
}

func makeAuthority(path, name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := template(pkix.Name{CommonName: "coracle " + name}, authorityLife)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	a := &authority{key: key}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return a, writePair(path, der, key)
}

func template(subject pkix.Name, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{SerialNumber: serial, Subject: subject, NotBefore: now.Add(-clockSkew), NotAfter: now.Add(life)}, nil
}

func (a *authority) issue(dir string, id identity) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	subject := pkix.Name{CommonName: id.user}
	if id.group != "" {
		subject.Organization = []string{id.group}
	}
	leaf, err := template(subject, identityLife)
	if err != nil {
		return err
	}
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	if id.client {
		leaf.ExtKeyUsage = append(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	if len(id.hosts) > 0 {
		leaf.ExtKeyUsage = append(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range id.hosts {
		if ip := net.ParseIP(h); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return err
	}
	if err := writePair(filepath.Join(dir, id.file), der, key); err != nil || !id.kconf {
		return err
	}
	return writeKubeconfig(filepath.Join(dir, id.file+".kubeconfig"), id, a.cert.Raw, der, key)
}

// makeSigningKey makes the key of service account tokens, where there is none: tokens outlive the API server.
func makeSigningKey(dir string) error {
	path := filepath.Join(dir, "service-accounts.key")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return writeKey(path, key)
}

func readPEM(path string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", path)
	}
	return block.Bytes, nil
}

func certificatePEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func writePair(path string, der []byte, key *ecdsa.PrivateKey) error {
	if err := writeFile(path+".crt", certificatePEM(der)); err != nil {
		return err
	}
	return writeKey(path+".key", key)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	raw, err := keyPEM(key)
	if err != nil {
		return err
	}
	return writeFile(path, raw)
}

// writeFile replaces a file that may be read at the same time; the temporary file is 0600 by os.CreateTemp.
func writeFile(path string, raw []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
