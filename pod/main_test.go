package pod

import (
	"testing"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// The tests mount and unshare, so they run as uid 0 of a user namespace of their own.
func TestMain(m *testing.M) { nstest.Main(m) }
