package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// TestTwoNodes: nodes of one user with different names have nothing in common but the user's ids.
func TestTwoNodes(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{})
	image := pushBusybox(t, registry)
	h := newHome(t)
	nodes := []*node{h.up("one"), h.up("two")}
	if nodes[0].endpoint == nodes[1].endpoint {
		t.Fatalf("both serve on %s", nodes[0].endpoint)
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for i, n := range nodes {
		n.crictl("pull", image)
		// The same pod, with the same name and uid, on both.
		pod, file := n.runPod("same", object{"port_mappings": []object{{"protocol": 0, "container_port": 8080, "host_port": 18220 + i}}})
		n.start(pod, file, "web", image, object{"command": []string{"/bin/sh", "-c", "echo " + n.name + " >/www/index.html; exec httpd -f -p 8080 -h /www"}})
	}
	for i, n := range nodes {
		eventually(t, 5*time.Second, "the node's own pod answers on its own port", func() error {
			body, err := get(client, fmt.Sprintf("http://127.0.0.1:%d/", 18220+i))
			if err == nil && strings.TrimSpace(body) != n.name {
				err = fmt.Errorf("it answers %q", body)
			}
			return err
		})
		if pods := strings.Fields(n.crictl("pods", "-q")); len(pods) != 1 {
			t.Errorf("node %s has pods %v", n.name, pods)
		}
	}
	// A port that the other node has published is taken.
	if r := nodes[1].try("runp", nodes[1].podConfig("thief", object{"port_mappings": []object{{"protocol": 0, "container_port": 1, "host_port": 18220}}})); r.code == 0 {
		t.Error("both nodes published port 18220")
	}
	nodes[0].down("--grace", "0s")
	if body, err := get(client, "http://127.0.0.1:18221/"); err != nil || strings.TrimSpace(body) != "two" {
		t.Errorf("node two after node one went down: %q, %v", body, err)
	}
	if r := h.coracle("status", "--name", "one"); r.code == 0 {
		t.Errorf("coracle status of the node that is down:\n%s", r.out)
	}
	if r := h.coracle("status", "--name", "two"); r.code != 0 {
		t.Errorf("coracle status of the node that is up:\n%s", r.errs)
	}
	nodes[1].down("--grace", "0s")
}

// TestLimits: what becomes of a limit is the policy's affair where this machine has no controller for it, and where it
// has one the kernel enforces it under both policies.
func TestLimits(t *testing.T) {
	const limit = 64 << 20
	resources := object{"linux": object{"resources": object{"memory_limit_in_bytes": limit, "cpu_quota": 50000, "cpu_period": 100000, "cpu_shares": 512}}}
	for _, policy := range []string{"best-effort", "strict"} {
		t.Run(policy, func(t *testing.T) {
			n, image := upWithBusybox(t, policy, "--limits", policy)
			// Where systemd delegates memory and pids only, the one limit is in force and the other is not.
			all, memory := n.condition("ResourceLimits"), n.hasController("memory")
			missing := map[bool]string{false: "memory", true: "cpu"}[memory]
			pod, file := n.runPod("limited", nil)
			r := n.try("create", pod, n.containerConfig("limited", image, shell("sleep 1000").with("linux", resources["linux"])), file)
			switch {
			case policy == "strict" && !all:
				if r.code == 0 || !strings.Contains(r.errs, missing) {
					t.Errorf("a limit that cannot be applied: exit code %d, %s", r.code, r.errs)
				}
				if out := n.crictl("ps", "-a", "-q"); out != "" {
					t.Errorf("the container that was refused is shown: %s", out)
				}
				// Without a limit a container runs under this policy too.
				n.start(pod, file, "unlimited", image, shell("sleep 1000"))
				return
			case r.code != 0:
				t.Fatalf("crictl create: exit code %d, %s", r.code, r.errs)
			}
			id := strings.TrimSpace(r.out)
			n.crictl("start", id)
			got := n.inspect("inspect", id).text("resources.linux.memoryLimitInBytes")
			if memory {
				if seen := n.exec(id, "cat", "/sys/fs/cgroup/memory.max"); seen != fmt.Sprint(limit) || got != fmt.Sprint(limit) {
					t.Errorf("memory.max is %s, the status says %s, want %d", seen, got, limit)
				}
				return
			}
			if got != "" && got != "0" {
				t.Errorf("the status says that a memory limit of %s is in force, and it is not", got)
			}
			if status := n.coracle("status", "--name", policy); !strings.Contains(status.out, "memory") {
				t.Errorf("coracle status does not say that memory limits are not applied:\n%s", status.out)
			}
		})
	}
}

// TestImport brings an image in from a file, without any registry.
func TestImport(t *testing.T) {
	img, err := busybox()
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("localhost/imported:dev")
	if err != nil {
		t.Fatal(err)
	}
	n := newHome(t).up("default")
	archive := n.path("image.tar")
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		t.Fatal(err)
	}
	if r := n.coracle("image", "import", archive); r.code != 0 || !strings.Contains(r.out, "localhost/imported:dev") {
		t.Fatalf("coracle image import: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	pod, file := n.runPod("imported", nil)
	id := n.start(pod, file, "imported", "localhost/imported:dev", nil)
	if out := n.exec(id, "cat", "/www/index.html"); !strings.Contains(out, "hello") {
		t.Errorf("the imported image: %q", out)
	}
	if err := os.WriteFile(archive, []byte("not an archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := n.coracle("image", "import", archive); r.code == 0 || r.errs == "" {
		t.Errorf("import of something else: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
}

// TestCutOffPull kills the node in the middle of a pull: nothing half done is left, and the next pull succeeds.
func TestCutOffPull(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{SlowBlobs: 300 * time.Millisecond})
	image := pushBusybox(t, registry)
	h := newHome(t)
	n := h.up("default")
	pull := n.crictlCommand("pull", image)
	if err := pull.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pull.Wait() }()
	eventually(t, 10*time.Second, "the pull has begun to fetch layers", func() error {
		if registry.Requests(func(method, path string) bool { return method == http.MethodGet && strings.Contains(path, "/blobs/") }) < 2 {
			return fmt.Errorf("no layer was asked for")
		}
		return nil
	})
	n.kill()
	if r := n.coracle("down"); r.code != 0 {
		t.Errorf("coracle down: exit code %d %s", r.code, r.errs)
	}
	n = h.up("default")
	if out := n.crictl("images", "-q"); out != "" {
		t.Errorf("an image that was not pulled to its end is shown: %s", out)
	}
	n.crictl("pull", image)
	eventually(t, 10*time.Second, "what was half done is gone", func() error {
		if left := glob(t, n.dataDir(), "images/tmp/*"); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	pod, file := n.runPod("p", nil)
	n.start(pod, file, "c", image, nil)
}

// TestParallelPods runs pods all at once: no two may share an address, and all are gone afterwards.
func TestParallelPods(t *testing.T) {
	n, image := upWithBusybox(t, "default")
	const count = 8
	type made struct {
		id  string
		err error
	}
	results := make(chan made, count)
	for i := range count {
		pod, container := n.podConfig(fmt.Sprintf("p%d", i), nil), n.containerConfig(fmt.Sprintf("c%d", i), image, nil)
		cmd := n.crictlCommand("run", container, pod)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
			defer stop()
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			results <- made{strings.TrimSpace(string(out)), err}
		}()
	}
	for range count {
		if r := <-results; r.err != nil {
			t.Error(r.err)
		}
	}
	var list struct {
		Items []struct{ ID string }
	}
	if err := json.Unmarshal([]byte(n.crictl("pods", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, p := range list.Items {
		ip := n.podIP(p.ID)
		if seen[ip] {
			t.Errorf("two pods have the address %s", ip)
		}
		seen[ip] = true
	}
	if len(seen) != count {
		t.Errorf("%d pods have an address, want %d", len(seen), count)
	}
	n.crictl("rmp", "--all", "--force")
	n.down()
}
