package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestNothingHeavyIsLinked: each container's init executes this program and initialises all that it links.
func TestNothingHeavyIsLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "seccomp runc_nocriu", ".").Output()
	if err != nil {
		t.Fatalf("list dependencies: %v", err)
	}
	heavy := []string{"google.golang.org/grpc", "k8s.io/", "github.com/google/go-containerregistry", "gvisor.dev/",
		"net/http", "github.com/rootless-containers/", "github.com/spf13/", "github.com/checkpoint-restore/"}
	n := 0
	for dep := range strings.Lines(string(out)) {
		n++
		for _, h := range heavy {
			if strings.HasPrefix(strings.TrimSpace(dep), h) {
				t.Errorf("coracle-keeper links %s", strings.TrimSpace(dep))
			}
		}
	}
	if n < 50 {
		t.Fatalf("only %d dependencies were listed", n)
	}
}
