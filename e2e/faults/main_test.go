package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
)

// Where the programs under test are: those that are shipped, and those whose daemon has crash points; and crictl.
var (
	shipped    = os.Getenv("CORACLE_E2E")
	withPoints = os.Getenv("CORACLE_E2E_POINTS")
	crictl     = os.Getenv("CORACLE_E2E_CRICTL")
)

func TestMain(m *testing.M) {
	box.Init()
	if shipped == "" {
		fmt.Println("e2e/faults: skipped: CORACLE_E2E does not name the built programs; to run these tests: make faults")
		os.Exit(0)
	}
	for _, dir := range []string{shipped, withPoints} {
		for _, program := range []string{"coracle", "coracle-keeper"} {
			if _, err := os.Stat(filepath.Join(dir, program)); err != nil || !filepath.IsAbs(dir) {
				fmt.Fprintf(os.Stderr, "e2e/faults: no %s in %q, an absolute path; to run these tests: make faults\n", program, dir)
				os.Exit(1)
			}
		}
	}
	if os.Getuid() == 0 {
		fmt.Fprintln(os.Stderr, "e2e/faults: this is root, and coracle is for ordinary users; to run these tests: make faults")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// patience is for what takes a fraction of a second where nothing else runs.
const patience = 30 * time.Second

// eventually calls probe until it returns nil, and fails the test with its last error when patience has run out.
func eventually(t *testing.T, what string, probe func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
