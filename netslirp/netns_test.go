package netslirp

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// TestAPanicOnAThreadIsTheCallers: who called recovers it, and finds where it came from, however many threads it passed.
func TestAPanicOnAThreadIsTheCallers(t *testing.T) {
	for name, fn := range map[string]func() error{
		"one thread":  defective,
		"two threads": func() error { return OnOwnThread(defective) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				reason := recover()
				if got := fmt.Sprintf("%v", reason); got != "a test's" {
					t.Errorf("a client is told %q", got)
				}
				err, ok := reason.(error)
				if !ok || !strings.Contains(err.Error(), "netslirp.defective") || strings.Count(err.Error(), "a thread of its own") != 1 {
					t.Errorf("the process ends with %v", err)
				}
				if got := fmt.Sprintf("%+v", reason); got != err.Error() {
					t.Errorf("a log has %q", got)
				}
			}()
			err := OnOwnThread(fn)
			t.Errorf("it returned: %v", err)
		})
	}
}

func defective() error { panic("a test's") }

func TestAnErrorOnAThreadIsReturned(t *testing.T) {
	want := errors.New("a test's")
	if err := OnOwnThread(func() error { return want }); !errors.Is(err, want) {
		t.Error(err)
	}
}
