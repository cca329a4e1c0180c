package threads

import (
	"os"
	"testing"
)

func TestKeep(t *testing.T) {
	const count = 40
	for range 2 { // the second time they are there
		Keep(count)
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		if len(tasks) < count || len(tasks) > count+20 {
			t.Errorf("%d threads, after %d were to be kept", len(tasks), count)
		}
	}
}
