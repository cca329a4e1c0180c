package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"
)

// Of the Kubernetes API two calls are needed, which its client library would make a hundred times as large.

// service is what matters here of a v1 Service.
type service struct {
	Metadata struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		UID       string `json:"uid"`
	} `json:"metadata"`
	Spec struct {
		Ports []struct {
			Protocol string `json:"protocol"`
			NodePort int    `json:"nodePort"`
		} `json:"ports"`
	} `json:"spec"`
}

type serviceList struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Items []service `json:"items"`
}

// apiClient talks to the API server of a kubeconfig.
type apiClient struct {
	server string
	http   *http.Client
}

func newAPIClient(path string) (*apiClient, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var c kubeconfig
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(c.Clusters) != 1 || len(c.Users) != 1 {
		return nil, fmt.Errorf("read %s: want one cluster and one user, as clusterkit pki writes it", path)
	}
	pair, err := tls.X509KeyPair(c.Users[0].User.Certificate, c.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.Clusters[0].Cluster.CA)
	return &apiClient{server: c.Clusters[0].Cluster.Server, http: &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, MinVersion: tls.VersionTLS12}}}}, nil
}

// callTimeout bounds a call that is answered at once.
const callTimeout = 10 * time.Second

func (a *apiClient) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.server+path, content)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, errors.Join(fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text), resp.Body.Close())
	}
	return resp, nil
}

// services lists the services of all namespaces.
func (a *apiClient) services(ctx context.Context) (serviceList, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var list serviceList
	resp, err := a.do(ctx, http.MethodGet, "/api/v1/services", nil)
	if err != nil {
		return list, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return list, fmt.Errorf("list services: %w", err)
	}
	return list, nil
}

// watchTime is how long one watch goes on, in seconds: an end of it without a change is no error.
const watchTime = 300

// awaitServiceChange returns at the first change of a service after version, or when the watch has ended.
func (a *apiClient) awaitServiceChange(ctx context.Context, version string) error {
	ctx, cancel := context.WithTimeout(ctx, watchTime*time.Second+callTimeout)
	defer cancel()
	query := url.Values{"watch": {"true"}, "resourceVersion": {version}, "timeoutSeconds": {fmt.Sprint(watchTime)}}
	resp, err := a.do(ctx, http.MethodGet, "/api/v1/services?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var event struct {
		Type string `json:"type"`
	}
	err = json.NewDecoder(resp.Body).Decode(&event)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// warn writes an event of a service, as `kubectl describe service` shows it.
func (a *apiClient) warn(ctx context.Context, s service, reason, message string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now := time.Now().UTC()
	resp, err := a.do(ctx, http.MethodPost, "/api/v1/namespaces/"+s.Metadata.Namespace+"/events", map[string]any{
		"apiVersion": "v1", "kind": "Event", "type": "Warning", "reason": reason, "message": message, "count": 1,
		"metadata":       map[string]any{"generateName": s.Metadata.Name + ".", "namespace": s.Metadata.Namespace},
		"involvedObject": map[string]any{"apiVersion": "v1", "kind": "Service", "namespace": s.Metadata.Namespace, "name": s.Metadata.Name, "uid": s.Metadata.UID},
		"source":         map[string]any{"component": "coracle-node-ports"},
		"firstTimestamp": now.Format(time.RFC3339), "lastTimestamp": now.Format(time.RFC3339),
	})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}
