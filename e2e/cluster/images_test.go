package cluster

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// TestPullSecret: a registry that asks for a name and a password gives its image to the pod that has them, and to no
// other, also when the image is there already.
func TestPullSecret(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	registry, err := fixture.StartRegistry(fixture.RegistryOptions{User: "user", Password: "password"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = registry.Close() })
	image, err := fixture.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Push(context.Background(), "private/busybox:1", image); err != nil {
		t.Fatal(err)
	}
	private := func(name, extra string) string {
		return strings.Replace(pod(name, "sleep 1000", extra), "IMAGE", registry.Addr+"/private/busybox:1", 1)
	}
	s.kubectl("create", "secret", "docker-registry", "credentials", "--docker-server="+registry.Addr, "--docker-username=user", "--docker-password=password")
	s.apply(private("stranger", ""))
	s.eventually("the pod without the secret gets no image", func() error {
		switch got := s.get("pod/stranger", "{.status.containerStatuses[0].state.waiting.reason}"); got {
		case "ErrImagePull", "ImagePullBackOff":
			return nil
		default:
			return fmt.Errorf("it waits for the reason %q", got)
		}
	})
	s.apply(private("friend", "  imagePullSecrets: [{name: credentials}]"))
	s.ready("friend")
	if got := s.get("pod/stranger", "{.status.phase}"); got != "Pending" {
		t.Errorf("the pod without the secret is %s", got)
	}
}

func TestPullPolicy(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	busybox, err := fixture.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := the.registry.Push(context.Background(), "policy/busybox:1", busybox); err != nil {
		t.Fatal(err)
	}
	image := the.registry.Addr + "/policy/busybox:1"
	manifests := func() int {
		return the.registry.Requests(func(_, path string) bool { return strings.Contains(path, "/policy/busybox/manifests/") })
	}
	with := func(name, policy string) {
		t.Helper()
		s.apply(strings.Replace(pod(name, "sleep 1000", ""), "IMAGE", image+"\n    imagePullPolicy: "+policy, 1))
	}
	with("never", "Never")
	s.eventually("an image that is not there is not pulled under Never", func() error {
		if got := s.get("pod/never", "{.status.containerStatuses[0].state.waiting.reason}"); got != "ErrImageNeverPull" {
			return fmt.Errorf("the reason is %q", got)
		}
		return nil
	})
	before := manifests()
	with("first", "IfNotPresent")
	s.ready("first")
	if manifests() == before {
		t.Error("the image was not asked for")
	}
	before = manifests()
	with("second", "IfNotPresent")
	s.ready("second")
	if got := manifests(); got != before {
		t.Errorf("an image that is there was asked for %d times under IfNotPresent", got-before)
	}
	with("always", "Always")
	s.ready("always")
	if manifests() == before {
		t.Error("the image was not asked for under Always")
	}
}

// TestImageGarbage: the kubelet removes an image that no container uses, and none that one does.
func TestImageGarbage(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	w, err := fixture.NewLayerWriter(fixture.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(fixture.Text("only-here", s.name)); err != nil {
		t.Fatal(err)
	}
	layer, err := w.Layer()
	if err != nil {
		t.Fatal(err)
	}
	image, err := fixture.Image(v1.Config{}, layer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := the.registry.Push(context.Background(), "garbage/data:1", image); err != nil {
		t.Fatal(err)
	}
	reference := the.registry.Addr + "/garbage/data:1"
	s.apply(pod("uses", "cat /image/only-here", "  restartPolicy: Never\n  volumes: [{name: image, image: {reference: "+reference+"}}]") +
		"    volumeMounts: [{name: image, mountPath: /image}]\n")
	want(t, s.succeeded("uses"), s.name)
	s.kubectl("delete", "pod", "uses")
	// The kubelet looks every five minutes, and removes at its second look what no container used at the first.
	deadline := time.Now().Add(11 * time.Minute)
	for there := true; there; time.Sleep(2 * time.Second) {
		out, err := the.crictl("images", "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		if there = strings.Contains(out, reference); there && time.Now().After(deadline) {
			t.Fatalf("the image is there after two looks of the kubelet:\n%s", out)
		}
	}
	if out, err := the.crictl("images", "-o", "json"); err != nil || !strings.Contains(out, "coredns") {
		t.Errorf("the image of the running CoreDNS is gone: %v\n%s", err, out)
	}
}

// TestLogRotation: the kubelet moves a long log away, the container goes on in a new one, and kubectl reads over both.
func TestLogRotation(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("chatty", "i=0; while [ $i -lt 6000 ]; do echo a line of some length, the number $i; i=$((i+1)); [ $((i % 100)) != 0 ] || sleep 0.2; done; echo the last line; sleep 1000", ""))
	s.ready("chatty")
	pattern := filepath.Join(the.dir, "data", "coracle-"+node, "kubelet", "log", "pods", s.name+"_chatty_*", "main", "0.log*")
	s.eventually("the log is rotated", func() error {
		files, err := filepath.Glob(pattern)
		if err == nil && len(files) < 2 {
			err = fmt.Errorf("the log's files: %v", files)
		}
		return err
	})
	s.eventually("the new file goes on", func() error {
		if log := s.kubectl("logs", "chatty", "--tail=1"); !strings.Contains(log, "the last line") {
			return fmt.Errorf("the last line is %q", log)
		}
		return nil
	})
}

// TestRuntimeClass: a pod of the class that scripts/cluster has made for the node's other handler runs by it.
func TestRuntimeClass(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("by-crun", "echo started; sleep 1000", "  runtimeClassName: crun"))
	s.ready("by-crun")
	want(t, s.exec("by-crun", "echo executed"), "executed")
	want(t, s.kubectl("logs", "by-crun"), "started")
	pods, err := the.crictl("pods", "--name", "by-crun")
	if err != nil {
		t.Fatal(err)
	}
	want(t, pods, "crun")
	// A class whose handler the node has not is refused in words.
	s.apply("{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: nobody-has}, handler: nobody-has}")
	t.Cleanup(func() { kubectl(t, "delete", "runtimeclass", "nobody-has") })
	s.apply(pod("by-nobody", "sleep 1000", "  runtimeClassName: nobody-has"))
	s.eventually("the refusal is told", func() error {
		out := s.kubectl("get", "events", "--field-selector", "involvedObject.name=by-nobody", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(out, "nobody-has") || !strings.Contains(out, "handler") {
			return fmt.Errorf("events: %s", out)
		}
		return nil
	})
}
