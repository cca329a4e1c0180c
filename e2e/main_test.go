package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
)

// Where the programs under test are: CORACLE_E2E is the directory of the built programs, CORACLE_E2E_CRICTL is crictl.
var (
	binDir    = os.Getenv("CORACLE_E2E")
	crictlBin = os.Getenv("CORACLE_E2E_CRICTL")
)

func TestMain(m *testing.M) {
	box.Init()
	if binDir == "" {
		fmt.Println("e2e: skipped: CORACLE_E2E does not name the built programs; to run these tests: make e2e")
		os.Exit(0)
	}
	if err := usable(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func usable() error {
	for _, program := range []string{filepath.Join(binDir, "coracle"), filepath.Join(binDir, "coracle-keeper"), crictlBin} {
		if !filepath.IsAbs(program) {
			return fmt.Errorf("%q is not an absolute path; to run these tests: make e2e", program)
		}
		if _, err := os.Stat(program); err != nil {
			return fmt.Errorf("%w; to run these tests: make e2e", err)
		}
	}
	if os.Getuid() == 0 {
		return fmt.Errorf("this is root, and coracle is for ordinary users; to run these tests: make e2e")
	}
	return nil
}

// eventually calls probe until it returns nil, and fails the test with its last error after the time.
func eventually(t *testing.T, within time.Duration, what string, probe func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
