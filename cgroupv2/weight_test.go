package cgroupv2

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSetCPUShares writes to plain files: the kernel's are compared where there is a cpu controller.
func TestSetCPUShares(t *testing.T) {
	root := t.TempDir()
	pod := filepath.Join(root, "pods", "podx")
	if err := os.MkdirAll(pod, 0o755); err != nil {
		t.Fatal(err)
	}
	weight := filepath.Join(pod, "cpu.weight")
	if err := os.WriteFile(weight, []byte("100"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := &Tree{mount: group(root), usable: true, controllers: []string{"cpu"}}
	for _, tc := range []struct {
		shares uint64
		want   string
	}{{0, "100"}, {2, "1"}, {1024, "100"}, {262144, "10000"}, {1 << 40, "10000"}} {
		if err := tree.SetCPUShares("/pods/podx", tc.shares); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(weight); err != nil || strings.TrimSpace(string(got)) != tc.want {
			t.Errorf("%d shares: weight %s, want %s (%v)", tc.shares, got, tc.want, err)
		}
	}
	if err := tree.SetCPUShares("/pods/none", 5); !errors.Is(err, ErrNotFound) {
		t.Errorf("no such pod: %v", err)
	}
	if err := tree.SetCPUShares("/../x", 5); !errors.Is(err, ErrInvalidPath) {
		t.Errorf("outside: %v", err)
	}
	if err := (&Tree{mount: group(root), usable: true}).SetCPUShares("/pods/none", 5); err != nil {
		t.Errorf("without the controller: %v", err)
	}
}
