package cgroupv2

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// fixtureTree is a Tree on an ordinary directory: reading is the same.
func fixtureTree(t testing.TB, files map[string]string) *Tree {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		full := filepath.Join(root, "pods/podx", name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &Tree{mount: group(root), usable: true}
}

func ptr(n uint64) *uint64 { return &n }

func TestStatsWithControllers(t *testing.T) {
	tree := fixtureTree(t, map[string]string{
		"cpu.stat":            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
		"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.05 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
		"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"memory.current":      "1000000\n",
		"memory.max":          "4000000\n",
		"memory.swap.current": "4096\n",
		"memory.stat":         "anon 300000\nfile 500000\nkernel 100000\ninactive_anon 1\nactive_anon 2\ninactive_file 200000\npgfault 55\npgmajfault 3\n",
		"memory.events":       "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n",
		"pids.current":        "17\n",
	})
	got, err := tree.Stats("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	want := Stats{
		CPUUsageNanos: ptr(1500000), MemoryUsage: ptr(1000000), MemoryLimit: ptr(4000000), WorkingSet: ptr(800000), RSS: ptr(300000),
		PageFaults: ptr(55), MajorPageFaults: ptr(3), SwapUsage: ptr(4096), OOMKills: ptr(1), Pids: ptr(17),
		CPUPressure:    &Pressure{Some: PressureLine{Avg10: 1.5, Avg60: 0.25, Avg300: 0.05, TotalNanos: 42000}, Full: PressureLine{TotalNanos: 7000}},
		MemoryPressure: &Pressure{},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", show(got), show(want))
	}
}

func TestStatsWithoutControllers(t *testing.T) {
	got, err := fixtureTree(t, map[string]string{"cpu.stat": "usage_usec 0\n"}).Stats("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	if want := (Stats{CPUUsageNanos: ptr(0)}); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", show(got), show(want))
	}
}

func TestStatsEdges(t *testing.T) {
	tree := fixtureTree(t, map[string]string{
		"cpu.stat":       "usage_usec 1\n",
		"memory.current": "100\n", "memory.max": "max\n", "memory.stat": "inactive_file 200\n",
	})
	got, err := tree.Stats("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	if got.MemoryLimit != nil {
		t.Errorf("limit %d for max, want nil", *got.MemoryLimit)
	}
	if got.WorkingSet == nil || *got.WorkingSet != 0 {
		t.Errorf("working set %v, want 0 where the page cache exceeds the usage", got.WorkingSet)
	}
	if _, err := tree.Stats("/pods/pody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
	broken := fixtureTree(t, map[string]string{"cpu.stat": "usage_usec 1\n", "pids.current": "many\n"})
	if _, err := broken.Stats("/pods/podx"); err == nil {
		t.Error("no error for a file that is no number")
	}
	if _, err := (&Tree{}).Stats("/pods/podx"); !errors.Is(err, ErrNotUsable) {
		t.Errorf("error %v, want ErrNotUsable", err)
	}
}

// show prints what the pointers point to.
func show(s Stats) string {
	var text strings.Builder
	v := reflect.ValueOf(s)
	for i := range v.NumField() {
		if f := v.Field(i); !f.IsNil() {
			fmt.Fprintf(&text, "%s=%v ", v.Type().Field(i).Name, f.Elem())
		}
	}
	return text.String()
}
