package keeper

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// TestADefectInReapingIsTold: the keeper goes on, launches are not held up, and the next look is made.
func TestADefectInReapingIsTold(t *testing.T) {
	var log bytes.Buffer
	c := newChildren(slog.New(slog.NewTextHandler(&log, nil)))
	c.quietly(func() { panic("a test's") })
	if !strings.Contains(log.String(), "a test's") || !strings.Contains(log.String(), "TestADefectInReapingIsTold") {
		t.Errorf("the log: %s", &log)
	}
	if _, err := c.launch(func() (int, error) { return 1, nil }); err != nil {
		t.Error(err)
	}
	looked := false
	c.quietly(func() { looked = true })
	if !looked {
		t.Error("no further look")
	}
}
