package pod

import (
	"testing"
	"time"
)

func TestCPURate(t *testing.T) {
	const none = ^uint64(0)
	type step struct {
		at         float64 // seconds
		total      uint64  // read
		wantTotal  uint64
		wantPerSec uint64
	}
	for name, steps := range map[string][]step{
		"one reading is none":                     {{0, 5e9, 5e9, none}},
		"the last two":                            {{0, 0, 0, none}, {10, 5e9, 5e9, 5e8}, {20, 25e9, 25e9, 2e9}},
		"two clients, one just after the other":   {{0, 0, 0, none}, {10, 5e9, 5e9, 5e8}, {10.1, 6.1e9, 6.1e9, 603960396}, {20, 6.1e9, 6.1e9, 1.1e8}},
		"too soon after the first":                {{0, 0, 0, none}, {0.5, 1e9, 1e9, none}, {2, 4e9, 4e9, 2e9}},
		"nobody has asked for long":               {{0, 0, 0, none}, {3600, 36e9, 36e9, none}, {3610, 46e9, 46e9, 1e9}},
		"what is summed up over processes falls":  {{0, 0, 0, none}, {10, 8e9, 8e9, 8e8}, {20, 3e9, 8e9, 0}, {30, 9e9, 9e9, 1e8}},
		"it does not fall between two within one": {{0, 0, 0, none}, {10, 8e9, 8e9, 8e8}, {10.5, 9e9, 9e9, 857142857}, {11, 8.5e9, 9e9, 1e9}},
		"readings that overtake each other":       {{0, 0, 0, none}, {10, 8e9, 8e9, 8e8}, {9.9, 7.9e9, 8e9, 808080808}},
		"more than a 64 bit product holds":        {{0, 0, 0, none}, {100, 12800e9, 12800e9, 128e9}},
	} {
		t.Run(name, func(t *testing.T) {
			var m cpuMeter
			for _, s := range steps {
				total, rate := m.observe(time.Unix(1e9, int64(s.at*1e9)), s.total)
				got := none
				if rate != nil {
					got = *rate
				}
				if total != s.wantTotal || max(got, s.wantPerSec)-min(got, s.wantPerSec) > 10 {
					t.Errorf("at %v: %d with %d/s, want %d with %d/s", s.at, total, got, s.wantTotal, s.wantPerSec)
				}
			}
			if last := steps[len(steps)-1].wantTotal; m.last() != last {
				t.Errorf("last %d, want %d", m.last(), last)
			}
		})
	}
}
