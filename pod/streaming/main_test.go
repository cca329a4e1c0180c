package streaming

import (
	"testing"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// No goroutine may be left by the tests.
func TestMain(m *testing.M) { nstest.Run(m) }
