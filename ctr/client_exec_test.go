package ctr

import (
	"context"
	"strings"
	"testing"
)

// TestADefectInAnExecIsItsError: whoever waits for the exit code is told, with the stack, and the process goes on.
func TestADefectInAnExecIsItsError(t *testing.T) {
	e := &ExecSession{stream: &stream{}, done: make(chan struct{})} // without a connection every read panics
	go e.await()
	_, err := e.Wait(context.Background())
	if err == nil || !strings.Contains(err.Error(), "has a defect") || !strings.Contains(err.Error(), "(*ExecSession).await") {
		t.Error(err)
	}
}
