package nstest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// leakPatience is how long goroutines may take that are on their way out when the last test has ended. On a busy machine
// some of the libraries' clients take seconds.
const leakPatience = 40 * time.Second

// lingering are goroutines of clients in tests, which their libraries let end by themselves: at a next ping, and half a
// minute after a connection was lost.
var lingering = []goleak.Option{
	goleak.IgnoreAnyFunction("k8s.io/client-go/tools/remotecommand.(*heartbeat).start"),
	goleak.IgnoreAnyFunction("github.com/moby/spdystream.(*Stream).WaitTimeout"),
}

// CheckGoroutines is for the end of a TestMain whose tests have passed: an error where a goroutine is left. Each of the
// product's has an owner whose Close waits for it; one that is left belongs to somebody who was not closed, or did not
// wait.
func CheckGoroutines() error {
	var err error
	for deadline := time.Now().Add(leakPatience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = goleak.Find(lingering...); err == nil {
			return nil
		}
	}
	return fmt.Errorf("goroutines are left after the last test: %w", err)
}

// Run runs the tests here, without namespaces, and exits the process with their code, or 1 where a goroutine is left.
func Run(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if err := CheckGoroutines(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
