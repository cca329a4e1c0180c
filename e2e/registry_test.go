package e2e

import (
	"context"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// The small image is packed once for all tests.
var busybox = sync.OnceValues(func() (v1.Image, error) { return fixture.Busybox() })

// newRegistry starts a registry that ends with the test.
func newRegistry(t *testing.T, o fixture.RegistryOptions) *fixture.Registry {
	t.Helper()
	r, err := fixture.StartRegistry(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// pushBusybox puts the small image, behind an index, into a registry and returns its reference.
func pushBusybox(t *testing.T, r *fixture.Registry) string {
	t.Helper()
	img, err := busybox()
	if err != nil {
		t.Fatal(err)
	}
	index, err := fixture.Index(img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Push(context.Background(), "tests/busybox:1", index); err != nil {
		t.Fatal(err)
	}
	return r.Addr + "/tests/busybox:1"
}

// upWithBusybox starts a node that has the small image.
func upWithBusybox(t *testing.T, name string, args ...string) (n *node, image string) {
	t.Helper()
	// The registry first: its socket belongs to the world before the node.
	registry := newRegistry(t, fixture.RegistryOptions{})
	image = pushBusybox(t, registry)
	n = newHome(t).up(name, args...)
	n.crictl("pull", image)
	return n, image
}
