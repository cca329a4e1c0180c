package keeper_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// keysOfUser is how many keys count against this user's quota (keyrings(7), /proc/key-users).
func keysOfUser(t *testing.T) (count int) {
	t.Helper()
	raw, err := os.ReadFile("/proc/key-users")
	if err != nil {
		t.Skip("this kernel has no keyrings")
	}
	for line := range strings.Lines(string(raw)) {
		var uid, usage, all, instantiated, charged, limit int
		if n, _ := fmt.Sscanf(line, " %d: %d %d/%d %d/%d", &uid, &usage, &all, &instantiated, &charged, &limit); n == 6 && uid == os.Geteuid() {
			return charged
		}
	}
	return 0
}

func TestContainersTakeNothingOfTheKeyQuota(t *testing.T) {
	n := newNode(t)
	n.create("warm", spec("sleep", "100"))
	n.start("warm")
	before := keysOfUser(t)
	for i := range 5 {
		n.create(fmt.Sprintf("c%d", i), spec("sleep", "100"))
		n.start(fmt.Sprintf("c%d", i))
	}
	if after := keysOfUser(t); after > before {
		t.Errorf("%d keys with one container, %d with six", before, after)
	}
	for i := range 5 {
		n.delete(fmt.Sprintf("c%d", i))
	}
	n.delete("warm")
}
