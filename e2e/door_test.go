package e2e

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// open are the files and directories of a node that others than its user may read, each with its reason. All of them lie
// in directories that are the user's alone.
var open = []struct{ pattern, why string }{
	{"data/coracle/images/layers/*", "what an image brings has the modes that the image says"},
	{"data/coracle/images/rootfs/*", "a container's processes have other ids, and their modes are theirs"},
	{"data/coracle/pause", "the root of pods' pause processes, which may have another id; the program is no secret"},
	{"run/coracle/rk/hosts", "RootlessKit's copy of the host's, which everybody may read"},
	{"run/coracle/rk/resolv.conf", "the same"},
	{"work/logs-*/*.log", "0640 as other runtimes' logs: collectors go by the group; the directory is the caller's"},
}

// TestFilesArePrivate: of all that a running node has on disk, sockets included, nobody but its user may open anything,
// but for what is listed above, and that not either, since the directories are closed.
func TestFilesArePrivate(t *testing.T) {
	// Modes are asked for, not left to a mask.
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("files", object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": 18220}}})
	id := n.start(pod, file, "files", image, shell("echo line; exec sleep 1000"))
	n.awaitLog(id, "line")
	n.exec(id, "true")
	var sockets []string
	for _, top := range []string{"run/coracle", "data/coracle", "work"} {
		err := filepath.WalkDir(n.path(top), func(path string, e fs.DirEntry, err error) error {
			name, relErr := filepath.Rel(n.dir, path)
			if err != nil || relErr != nil {
				return nil // a file of the node's that went, or of a container's that is another id's
			}
			info, err := e.Info()
			if err != nil {
				return nil
			}
			if info.Mode()&fs.ModeSocket != 0 {
				sockets = append(sockets, name)
			}
			if listed(name) {
				if e.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			closed := info.Mode()&fs.ModeSymlink != 0 || info.Mode().Perm()&0o077 == 0 || info.IsDir() && info.Mode().Perm()&0o066 == 0
			if stat := info.Sys().(*syscall.Stat_t); !closed && !isNamespace(path) {
				t.Errorf("%s is %v, of uid %d", name, info.Mode(), stat.Uid)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"run/coracle", "data/coracle"} {
		if info, err := os.Stat(n.path(dir)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info.Mode(), err)
		}
	}
	if len(sockets) < 3 {
		t.Errorf("found %v: the CRI's, the keeper's and RootlessKit's sockets are not all there", sockets)
	}
	n.down("--grace", "0s")
}

func listed(name string) bool {
	return slices.ContainsFunc(open, func(o struct{ pattern, why string }) bool {
		ok, err := filepath.Match(o.pattern, name)
		return ok && err == nil
	})
}

// isNamespace: the mount point of a pinned namespace is seen in the node's mount namespace only; the file below is empty.
func isNamespace(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Size() == 0 && strings.Contains(path, "/ns/")
}

// TestSecretsAreKept: credentials of registries, whether of the call or of the user's docker configuration, and the values
// of containers' variables are in no log, in no error, in no command line and in no file that others may read.
func TestSecretsAreKept(t *testing.T) {
	const fromCall, fromFile, wrong, variable = "s3cret-of-the-call", "s3cret-of-the-file", "s3cret-that-is-wrong", "s3cret-of-a-variable"
	registry := newRegistry(t, fixture.RegistryOptions{User: "me", Password: fromCall})
	other := newRegistry(t, fixture.RegistryOptions{User: "me", Password: fromFile})
	image := pushBusybox(t, registry)
	second := pushBusybox(t, other)
	h := newHome(t)
	h.mkdir("home", ".docker")
	h.writeAt(h.path("home", ".docker", "config.json"), fmt.Sprintf(`{"auths": {%q: {"username": "me", "password": %q}}}`, other.Addr, fromFile))
	n := h.up("default", "--log-level", "debug")
	client := n.client()
	pull := func(ref string, auth *runtimeapi.AuthConfig) string {
		_, err := client.images.PullImage(context.Background(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, Auth: auth})
		return fmt.Sprint(err)
	}
	said := []string{
		pull(image, &runtimeapi.AuthConfig{Username: "me", Password: wrong}),
		pull(image, &runtimeapi.AuthConfig{IdentityToken: wrong}),
		pull(image, &runtimeapi.AuthConfig{RegistryToken: wrong}),
		pull(image, &runtimeapi.AuthConfig{Auth: wrong}),
		pull("me:"+wrong+"@"+registry.Addr+"/x", nil),
	}
	for _, ref := range []string{image, second} {
		if err := pull(ref, map[string]*runtimeapi.AuthConfig{image: {Username: "me", Password: fromCall}}[ref]); err != "<nil>" {
			t.Fatalf("pull %s: %s", ref, err)
		}
	}
	env := []object{{"key": "SECRET", "value": variable}}
	pod, file := n.runPod("secrets", nil)
	id := n.start(pod, file, "secrets", image, shell("exec sleep 1000").with("envs", env))
	said = append(said, n.try("create", pod, n.containerConfig("wrong", image, object{"envs": env, "command": []string{"/no/such"},
		"mounts": []object{{"host_path": "/no/such", "container_path": "/x"}}}), file).errs)
	broken := n.containerConfig("broken", image, object{"envs": env, "command": []string{"/no/such"}})
	said = append(said, n.try("start", strings.TrimSpace(n.crictl("create", pod, broken, file))).errs)
	r := n.try("exec", id, "/no/such")
	said = append(said, r.out+r.errs, n.coracle("status", "--verbose").out)
	url := client.execURL(t, id)
	token := url[strings.LastIndex(url, "/")+1:]

	secrets := []string{fromCall, fromFile, wrong, variable, token}
	find := func(where, text string) {
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s is in %s", s, where)
			}
		}
	}
	for _, text := range said {
		find("the answer "+text, text)
	}
	find("the node's log", n.logged())
	for pid := range n.trace().pids {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil {
			find("the command line "+string(args), string(args))
		}
	}
	n.searchReadable(find)
	// After all of it has ended, its log.
	n.down("--grace", "0s")
	find("the node's log", n.logged())
}

// searchReadable looks through the files of the node that a mode lets others read.
func (n *node) searchReadable(find func(where, text string)) {
	n.t.Helper()
	looked := 0
	for _, top := range []string{"run", "data"} {
		_ = filepath.WalkDir(n.path(top), func(path string, e fs.DirEntry, err error) error {
			if err != nil || strings.Contains(path, "/layers/") || strings.Contains(path, "/rootfs/") {
				return nil
			}
			info, err := e.Info()
			if err != nil || !info.Mode().IsRegular() {
				return nil
			}
			looked++
			if info.Mode().Perm()&0o044 == 0 {
				return nil
			}
			raw, err := os.ReadFile(path)
			if err == nil {
				find(path, string(raw))
			}
			return nil
		})
	}
	if looked == 0 {
		n.t.Error("no file of the node's was found")
	}
}

// criClient calls the CRI itself, where crictl has no words for it.
type criClient struct {
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
}

func (n *node) client() criClient {
	n.t.Helper()
	conn, err := grpc.NewClient(n.endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(1<<30)))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return criClient{conn, runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)}
}

func (c criClient) execURL(t *testing.T, id string) string {
	t.Helper()
	resp, err := c.runtime.Exec(context.Background(), &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetUrl()
}

// TestDoorHolds: what comes to the CRI's socket and to the streaming port in number or in size does not keep others from
// being served, and the daemon is the same afterwards.
func TestDoorHolds(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("door", nil)
	id := n.start(pod, file, "door", image, shell("exec sleep 1000"))
	daemon := n.daemon()
	served := func(after string) {
		t.Helper()
		if out := n.exec(id, "echo", "served"); out != "served" {
			t.Errorf("after %s: %q", after, out)
		}
	}
	client := n.client()

	_, err := client.runtime.ExecSync(context.Background(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{strings.Repeat("x", 100<<20)}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of 100 MB: %v", err)
	}
	served("a message of 100 MB")

	streaming := strings.Split(strings.TrimPrefix(client.execURL(t, id), "http://"), "/")[0]
	var idle []net.Conn
	for range 500 {
		for _, at := range [][2]string{{"unix", strings.TrimPrefix(n.endpoint, "unix://")}, {"tcp", streaming}} {
			conn, err := net.Dial(at[0], at[1])
			if err != nil {
				t.Fatalf("connection %d to %s: %v", len(idle), at[1], err)
			}
			idle = append(idle, conn)
		}
	}
	served("a thousand connections that say nothing")
	for _, conn := range idle {
		conn.Close()
	}

	var flood sync.WaitGroup
	failed := make(chan error, 8)
	for range cap(failed) {
		flood.Go(func() {
			flooder := runtimeapi.NewRuntimeServiceClient(client.conn)
			for range 500 {
				if _, err := flooder.ListContainers(context.Background(), &runtimeapi.ListContainersRequest{}); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	served("a flood of calls")
	flood.Wait()
	close(failed)
	for err := range failed {
		t.Errorf("a call of the flood: %v", err)
	}
	if now := n.daemon(); now != daemon {
		t.Errorf("the daemon was %d and is %d", daemon, now)
	}
	n.down("--grace", "0s")
}

// TestStreamURLs: a URL serves once, to who comes by an address, and is of no use with another token.
func TestStreamURLs(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	pod, file := n.runPod("urls", nil)
	id := n.start(pod, file, "urls", image, shell("exec sleep 1000"))
	client := n.client()
	ask := func(url, host string) int {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := (&http.Client{Timeout: 10 * time.Second}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	url := client.execURL(t, id)
	if !strings.HasPrefix(url, "http://127.0.0.1:") {
		t.Errorf("URL %s", url)
	}
	if code := ask(url, "evil.example"); code != http.StatusForbidden {
		t.Errorf("by another name: %d", code)
	}
	if code := ask(url[:len(url)-1]+"!", ""); code != http.StatusNotFound {
		t.Errorf("another token: %d", code)
	}
	if code := ask(url, ""); code != http.StatusBadRequest { // no upgrade: but it was let in
		t.Errorf("the first time: %d", code)
	}
	if code := ask(url, ""); code != http.StatusNotFound {
		t.Errorf("the second time: %d", code)
	}
	n.down("--grace", "0s")
}

// TestSocketInAPod: a socket that a hostPath brings into a pod is a grant to its root, who is the user, and not to the
// pod's other ids.
func TestSocketInAPod(t *testing.T) {
	x := newTarget(t)
	socket := filepath.Join(x.dir, "run", "coracle")
	mounts := []object{{"host_path": socket, "container_path": "/door"}}
	pod, file := x.runPod("door", nil)
	probe := shell("exec sleep 1000").with("mounts", append(mounts,
		object{"host_path": hostileBin, "container_path": "/hostile", "readonly": true}))
	root := x.start(pod, file, "root", x.image, probe)
	other := x.start(pod, file, "other", x.image, probe.with("linux", object{"security_context": object{"run_as_user": object{"value": 1000}}}))
	sockets := []string{"coracle.sock", "keeper.sock", "admin.sock", "ports.sock", "rk/.bp.sock", "rk/api.sock"}
	for _, name := range sockets {
		if out := x.exec(other, "/hostile", "greet", "/door/"+name); !strings.Contains(out, "kept") {
			t.Errorf("%s and another id: %s", name, out)
		}
	}
	x.exec(root, "sh", "-c", "chmod 0777 /door /door/*.sock /door/rk /door/rk/.bp.sock /door/rk/*.sock") // what the pod's root can do for the other one
	for _, name := range sockets {
		if out := x.exec(other, "/hostile", "greet", "/door/"+name); !strings.Contains(out, "kept") || strings.Contains(out, "permission denied") {
			t.Errorf("%s, that all may open, and another id: %s", name, out)
		}
	}
	for name, want := range map[string]string{"coracle.sock": "through", "ports.sock": "through", "rk/.bp.sock": "through",
		"rk/api.sock": "ports are published by the node alone"} {
		if out := x.exec(root, "/hostile", "greet", "/door/"+name); !strings.Contains(out, want) {
			t.Errorf("%s and the pod's root, who is the user: %s, want %s", name, out, want)
		}
	}
	for _, said := range []string{"connection refused: the socket is for the user who started the node", "port driver: connection refused"} {
		if !x.logContains(said) {
			t.Errorf("the log has no %q", said)
		}
	}
	x.down("--grace", "0s")
}
