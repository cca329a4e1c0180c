package cgroupv2

import (
	"encoding/json"
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

var controllerFiles = map[string]string{
	"cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnice_usec 0\ncore_sched.force_idle_usec 0\n" +
		"nr_periods 40\nnr_throttled 3\nthrottled_usec 2500\nnr_bursts 0\nburst_usec 0\n",
	"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.05 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
	"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
	"memory.current":      "1000000\n",
	"memory.max":          "4000000\n",
	"memory.min":          "50000\n",
	"memory.peak":         "2000000\n",
	"memory.swap.current": "4096\n",
	"memory.swap.max":     "8192\n",
	"memory.stat": "anon 300000\nfile 500000\nkernel 100000\nfile_mapped 7000\ninactive_anon 1\nactive_anon 2\ninactive_file 200000\n" +
		"active_file 250000\npgfault 55\npgmajfault 3\n",
	"memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n",
	"pids.current":  "17\n",
	"pids.max":      "100\n",
	"io.stat": "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=50331648 dios=1\n" +
		"252:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n7:0 \n259:0 cost.vrate=100.00\n",
}

func TestStatsWithControllers(t *testing.T) {
	tree := fixtureTree(t, controllerFiles)
	want := Stats{
		CPU: CPU{Usage: ptr(1500000), User: ptr(1000000), System: ptr(500000), Periods: ptr(40), Throttled: ptr(3), ThrottledTime: ptr(2500000)},
		Memory: Memory{Usage: ptr(1000000), Limit: ptr(4000000), WorkingSet: ptr(800000), RSS: ptr(300000), Swap: ptr(4096), SwapLimit: ptr(8192),
			Faults: ptr(55), MajorFaults: ptr(3), Cache: ptr(500000), MappedFile: ptr(7000), ActiveFile: ptr(250000), InactiveFile: ptr(200000),
			Kernel: ptr(100000)},
		CPUPressure:    &Pressure{Some: PressureLine{Avg10: 1.5, Avg60: 0.25, Avg300: 0.05, TotalNanos: 42000}, Full: PressureLine{TotalNanos: 7000}},
		MemoryPressure: &Pressure{},
	}
	got, err := tree.Stats("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", show(got), show(want))
	}
	want.Memory.Min, want.Memory.Peak, want.Memory.LimitHits, want.Memory.OOMKills = ptr(50000), ptr(2000000), ptr(12), ptr(1)
	want.Tasks, want.TasksMax = ptr(17), ptr(100)
	want.IO = []DeviceIO{
		{Major: 8, Minor: 16, ReadBytes: 1459200, WriteBytes: 314773504, DiscardBytes: 50331648, Reads: 192, Writes: 353},
		{Major: 252, Minor: 0, ReadBytes: 4096, Reads: 1},
	}
	if got, err = tree.Details("/pods/podx"); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("details\ngot  %s\nwant %s", show(got), show(want))
	}
}

func TestStatsWithoutControllers(t *testing.T) {
	got, err := fixtureTree(t, map[string]string{"cpu.stat": "usage_usec 0\nuser_usec 0\nsystem_usec 0\n"}).Details("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	if want := (Stats{CPU: CPU{Usage: ptr(0), User: ptr(0), System: ptr(0)}}); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", show(got), show(want))
	}
}

// TestStatsLooksOnlyForWhatThereCanBe: without the memory controller five opens of every pass would fail.
func TestStatsLooksOnlyForWhatThereCanBe(t *testing.T) {
	tree := fixtureTree(t, controllerFiles)
	tree.files = map[string]bool{"cpu.stat": true, "cpu.pressure": true}
	got, err := tree.Details("/pods/podx")
	if err != nil || got.CPU.Usage == nil || got.CPUPressure == nil {
		t.Fatalf("%s, %v", show(got), err)
	}
	if got.MemoryPressure != nil || got.Memory != (Memory{}) || got.Tasks != nil || got.IO != nil {
		t.Errorf("%s of files that a pod's cgroup is known not to have", show(got))
	}
}

func TestStatsEdges(t *testing.T) {
	tree := fixtureTree(t, map[string]string{
		"cpu.stat":       "usage_usec 1\n",
		"memory.current": "100\n", "memory.max": "max\n", "memory.swap.max": "max\n", "memory.stat": "inactive_file 200\n", "pids.max": "max\n",
	})
	got, err := tree.Details("/pods/podx")
	if err != nil {
		t.Fatal(err)
	}
	if got.Memory.Limit != nil || got.Memory.SwapLimit != nil || got.TasksMax != nil {
		t.Errorf("a limit for max: %s", show(got))
	}
	if got.Memory.WorkingSet == nil || *got.Memory.WorkingSet != 0 {
		t.Errorf("working set %v, want 0 where the page cache exceeds the usage", got.Memory.WorkingSet)
	}
	if _, err := tree.Stats("/pods/pody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
	for file, text := range map[string]string{"pids.current": "many\n", "io.stat": "8:0 rbytes=x\n", "cpu.pressure": "some avg10=x total=1\n"} {
		broken := fixtureTree(t, map[string]string{"cpu.stat": "usage_usec 1\n", file: text})
		if _, err := broken.Details("/pods/podx"); err == nil {
			t.Errorf("no error for %s with %q", file, text)
		}
	}
	if _, err := (&Tree{}).Stats("/pods/podx"); !errors.Is(err, ErrNotUsable) {
		t.Errorf("error %v, want ErrNotUsable", err)
	}
	if _, err := (&Tree{}).Processes("/pods/podx"); !errors.Is(err, ErrNotUsable) {
		t.Errorf("error %v, want ErrNotUsable", err)
	}
}

// TestProcessesOfManyAndNested: more than the buffer holds, and one cgroup below.
func TestProcessesOfManyAndNested(t *testing.T) {
	var list strings.Builder
	for pid := range 5000 {
		fmt.Fprintln(&list, pid+1)
	}
	tree := fixtureTree(t, map[string]string{"cgroup.procs": list.String(), "inner/cgroup.procs": "6000\n", "empty/cgroup.procs": ""})
	pids, err := tree.Processes("/pods/podx")
	if err != nil || len(pids) != 5001 || pids[0] != 1 || pids[4999] != 5000 || pids[5000] != 6000 {
		t.Errorf("%d processes, %v", len(pids), err)
	}
	if pids, err := tree.Processes("/pods/pody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v, %v, want ErrNotFound", pids, err)
	}
}

// show prints what the pointers point to.
func show(s Stats) string {
	raw, err := json.Marshal(s)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}
