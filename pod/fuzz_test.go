package pod

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images/protofuzz"
)

// The words that stand for ids in a fuzzed request: of a pod that is ready, of a container in it that runs, and of one
// that is created.
const (
	readyPod         = "POD"
	runningContainer = "RUNNING"
	createdContainer = "CREATED"
)

// fuzzPatience bounds a call. The callers' own deadline is shorter: who is told of it has to return.
const (
	fuzzDeadline = 2 * time.Second
	fuzzPatience = 20 * time.Second
)

// fuzzNode is a service on the working fakes, with the three objects.
type fuzzNode struct {
	*harness
	ids map[string]string
}

func newFuzzNode(f *testing.F) *fuzzNode {
	f.Helper()
	for fd := 3; fd < 8; fd++ {
		unix.CloseOnExec(fd) // the fuzzer's pipes: it waits for their end, which no container may hold up
	}
	n := &fuzzNode{harness: newHarness(f), ids: map[string]string{}}
	n.cfg.Log = slog.New(slog.DiscardHandler) // a fuzz target may not log to f
	n.restart(nil)
	// The fake keeper runs commands as processes of this machine: those of a fuzzer are not to be among them.
	n.keeper.setFailure("exec", ctr.ErrNotRunning)
	return n
}

// within is a context for one call.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), fuzzDeadline)
	t.Cleanup(cancel)
	return ctx
}

// ensure makes those of the three objects that an earlier call has taken away.
func (n *fuzzNode) ensure(t *testing.T) {
	t.Helper()
	if p, err := n.index.pod(n.ids[readyPod]); err != nil || !p.status.snapshot().ready() {
		n.sweep(t, nil)
		resp, err := n.RunPodSandbox(within(t), &runtimeapi.RunPodSandboxRequest{Config: n.podConfig("fuzz")})
		if err != nil {
			t.Fatal(err)
		}
		n.ids = map[string]string{readyPod: resp.PodSandboxId}
	}
	for name, want := range map[string]runtimeapi.ContainerState{
		runningContainer: runtimeapi.ContainerState_CONTAINER_RUNNING, createdContainer: runtimeapi.ContainerState_CONTAINER_CREATED,
	} {
		c, err := n.index.container(n.ids[name])
		if err == nil && c.status.snapshot().state() == want {
			continue
		}
		n.keep(t, name)
		resp, err := n.CreateContainer(within(t), &runtimeapi.CreateContainerRequest{PodSandboxId: n.ids[readyPod], Config: shell(name, "exec sleep 1000")})
		if err != nil {
			t.Fatal(err)
		}
		n.ids[name] = resp.ContainerId
		if name == runningContainer {
			if _, err := n.StartContainer(within(t), &runtimeapi.StartContainerRequest{ContainerId: resp.ContainerId}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// keep removes what has the name of one of the three objects, in whatever state it is.
func (n *fuzzNode) keep(t *testing.T, name string) {
	t.Helper()
	if _, err := n.RemoveContainer(within(t), &runtimeapi.RemoveContainerRequest{ContainerId: n.ids[name]}); err != nil && n.ids[name] != "" {
		t.Fatal(err)
	}
	delete(n.ids, name)
}

// sweep removes all objects but those in spare.
func (n *fuzzNode) sweep(t *testing.T, spare map[string]string) {
	t.Helper()
	spared := map[string]bool{}
	for _, id := range spare {
		spared[id] = true
	}
	for _, c := range n.index.allContainers("") {
		if !spared[c.spec.ID] {
			if _, err := n.RemoveContainer(within(t), &runtimeapi.RemoveContainerRequest{ContainerId: c.spec.ID}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, p := range n.index.allPods() {
		if !spared[p.spec.ID] {
			if _, err := n.RemovePodSandbox(within(t), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.spec.ID}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// nothingLeft compares with the three objects: in memory, on disk, and with the leaves.
func (n *fuzzNode) nothingLeft(t *testing.T) {
	t.Helper()
	n.sweep(t, n.ids)
	pods, containers := len(n.index.allPods()), len(n.index.allContainers(""))
	if len(n.index.pods) != pods || len(n.index.containers) != containers || len(n.index.names) != pods+containers {
		t.Fatalf("the index holds %d pods, %d containers and %d names", len(n.index.pods), len(n.index.containers), len(n.index.names))
	}
	for _, dir := range []string{n.cfg.RuntimeDir, n.cfg.DataDir} {
		for sub, want := range map[string]int{"pods": pods, "containers": containers} {
			if entries, err := os.ReadDir(filepath.Join(dir, sub)); err != nil || len(entries) != want {
				t.Fatalf("%s/%s holds %v (%v), want %d", dir, sub, entries, err, want)
			}
		}
	}
	held := 0
	for _, p := range n.index.allPods() {
		if !p.status.snapshot().Released {
			held++
		}
	}
	if a, m, c := len(n.network.attached), len(n.images.mounted), len(n.cgroups.pods()); a != held || m != containers || c > pods {
		t.Fatalf("of %d pods (%d not stopped) and %d containers: %d attached, %d mounted, %d cgroups", pods, held, containers, a, m, c)
	}
	if len(n.images.volumes) > 0 {
		t.Fatalf("image volumes left: %v", n.images.volumes)
	}
	logs, err := os.ReadDir(n.logs)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range logs {
		// Log directories are the caller's to remove; that of the pod which stays is in use.
		if e.Name() == "fuzz" {
			continue
		}
		if err := os.RemoveAll(filepath.Join(n.logs, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// tame puts the ids of objects in, and keeps what the request would make on this machine's disk below the test's
// directory.
func (n *fuzzNode) tame(m protoreflect.Message) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.IsMap():
		case field.IsList():
			for i := range v.List().Len() {
				if field.Message() != nil {
					n.tame(v.List().Get(i).Message())
				} else if id, known := n.ids[v.List().Get(i).String()]; known && field.Kind() == protoreflect.StringKind {
					v.List().Set(i, protoreflect.ValueOfString(id))
				}
			}
		case field.Message() != nil:
			n.tame(v.Message())
		case field.Kind() == protoreflect.StringKind:
			if id, known := n.ids[v.String()]; known {
				m.Set(field, protoreflect.ValueOfString(id))
			}
			if field.Name() == "log_directory" && filepath.IsAbs(v.String()) {
				m.Set(field, protoreflect.ValueOfString(filepath.Join(n.logs, filepath.Clean(v.String()))))
			}
		}
		return true
	})
}

// request is a pointer to a request type.
type request[T any] interface {
	*T
	proto.Message
}

// fuzzRPC feeds requests to one RPC. It fails where the server panics or says Internal, where the call does not come
// back, and where anything is left that no RPC tells of.
func fuzzRPC[T any, P request[T]](f *testing.F, call func(*Service, context.Context, P) error, seeds ...P) {
	f.Helper()
	seeds = append(seeds, P(new(T)))
	for i := range seeds {
		f.Add(uint8(i), []byte(nil))
	}
	n := newFuzzNode(f)
	f.Fuzz(func(t *testing.T, seed uint8, script []byte) {
		req := proto.CloneOf(seeds[int(seed)%len(seeds)])
		protofuzz.Edit(req.ProtoReflect(), script)
		n.ensure(t)
		n.tame(req.ProtoReflect())
		done := make(chan error, 1)
		ctx := within(t)
		go func() { done <- call(n.Service, ctx, req) }()
		select {
		case err := <-done:
			if status.Code(err) == codes.Internal || status.Code(err) == codes.Unknown {
				t.Errorf("%v: for %v", err, req)
			}
		case <-time.After(fuzzPatience):
			stacks := make([]byte, 1<<20)
			t.Fatalf("the call does not come back: %v\n%s", req, stacks[:runtime.Stack(stacks, true)])
		}
		n.nothingLeft(t)
	})
}

// fuzzUnary is fuzzRPC for a method with one answer.
func fuzzUnary[T, R any, P request[T]](f *testing.F, method func(*Service, context.Context, P) (*R, error), seeds ...P) {
	f.Helper()
	fuzzRPC(f, func(s *Service, ctx context.Context, req P) error {
		_, err := method(s, ctx, req)
		return err
	}, seeds...)
}

// fuzzStream is fuzzRPC for a method that streams.
func fuzzStream[T, R any, P request[T]](f *testing.F, method func(*Service, P, grpc.ServerStreamingServer[R]) error, seeds ...P) {
	f.Helper()
	fuzzRPC(f, func(s *Service, ctx context.Context, req P) error { return method(s, req, &sink[R]{ctx: ctx}) }, seeds...)
}
