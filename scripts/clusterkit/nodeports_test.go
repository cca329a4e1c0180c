package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// portTable is a port driver without a network: it knows which ports are taken.
type portTable struct {
	mu    sync.Mutex
	next  int
	ports []port.Status
	taken int // a port that another program of the host has
}

func (p *portTable) AddPort(_ context.Context, spec port.Spec) (*port.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if spec.ParentPort == p.taken {
		return nil, errors.New("address already in use")
	}
	p.next++
	st := port.Status{ID: p.next, Spec: spec}
	p.ports = append(p.ports, st)
	return &st, nil
}

func (p *portTable) ListPorts(context.Context) ([]port.Status, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.ports), nil
}

func (p *portTable) RemovePort(_ context.Context, id int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ports = slices.DeleteFunc(p.ports, func(st port.Status) bool { return st.ID == id })
	return nil
}

func (p *portTable) published() (out []nodePort) {
	list, _ := p.ListPorts(context.Background())
	for _, st := range list {
		out = append(out, nodePort{st.Spec.Proto, st.Spec.ParentPort})
	}
	return out
}

// apiServer has services, lets clients watch them, and takes events.
type apiServer struct {
	mu      sync.Mutex
	list    serviceList
	version int
	changed chan struct{}
	events  []string
}

func (a *apiServer) set(services ...service) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list.Items = services
	a.version++
	a.list.Metadata.ResourceVersion = strconv.Itoa(a.version)
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	list, changed := a.list, a.changed
	a.mu.Unlock()
	switch {
	case r.Method == http.MethodPost:
		raw, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		a.events = append(a.events, string(raw))
		a.mu.Unlock()
		w.WriteHeader(http.StatusCreated)
	case r.URL.Query().Get("watch") != "":
		if r.URL.Query().Get("resourceVersion") != list.Metadata.ResourceVersion {
			_, _ = io.WriteString(w, `{"type": "MODIFIED"}`) // between the list and the watch
			return
		}
		select {
		case <-changed:
			_, _ = io.WriteString(w, `{"type": "MODIFIED"}`)
		case <-r.Context().Done():
		}
	default:
		_ = json.NewEncoder(w).Encode(list)
	}
}

func nodePortService(name string, ports ...nodePort) service {
	var s service
	s.Metadata.Name, s.Metadata.Namespace = name, "default"
	for _, p := range ports {
		s.Spec.Ports = append(s.Spec.Ports, struct {
			Protocol string `json:"protocol"`
			NodePort int    `json:"nodePort"`
		}{p.protocol, p.port})
	}
	return s
}

func TestNodePortsFollowServices(t *testing.T) {
	api := &apiServer{changed: make(chan struct{})}
	server := httptest.NewServer(api)
	defer server.Close()
	table := &portTable{taken: 31000}
	others := []port.Spec{
		{Proto: "tcp", ParentPort: 6443, ChildIP: "10.0.2.100", ChildPort: 6443},  // the API server's
		{Proto: "tcp", ParentPort: 30005, ChildIP: "10.88.0.2", ChildPort: 30005}, // a pod's host port
	}
	for _, spec := range others {
		if _, err := table.AddPort(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
	}
	p := &publisher{api: &apiClient{server: server.URL, http: server.Client()}, ports: table, nodeIP: "10.0.2.100", address: "127.0.0.1",
		log: slog.New(slog.DiscardHandler), told: map[nodePort]string{}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); p.run(ctx) }()
	defer func() { cancel(); <-ended }()

	always := []nodePort{{"tcp", 6443}, {"tcp", 30005}}
	expect := func(want ...nodePort) {
		t.Helper()
		want = append(slices.Clone(always), want...)
		var got []nodePort
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if got = table.published(); slices.Equal(got, want) {
				return
			}
		}
		t.Fatalf("published: %v, want %v", got, want)
	}
	expect()
	api.set(nodePortService("a", nodePort{"TCP", 30001}), nodePortService("none", nodePort{"TCP", 0}))
	expect(nodePort{"tcp", 30001})
	api.set(nodePortService("a", nodePort{"TCP", 30001}, nodePort{"UDP", 30001}))
	expect(nodePort{"tcp", 30001}, nodePort{"udp", 30001})
	api.set(nodePortService("taken", nodePort{"TCP", 31000}), nodePortService("b", nodePort{"UDP", 30001}))
	expect(nodePort{"udp", 30001})
	api.set()
	expect()
	api.mu.Lock()
	defer api.mu.Unlock()
	if len(api.events) != 1 {
		t.Errorf("events of the taken port: %q, want one", api.events)
	}
}
