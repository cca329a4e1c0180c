package pod

import (
	"sync"
	"time"
)

const (
	// rateWindow is the least time over which CPU use is averaged. Two clients that ask one after the other would otherwise
	// be told what happened between the two.
	rateWindow = time.Second
	// rateAge is the most: an average over an hour in which nobody asked is not what is used now.
	rateAge = 2 * time.Minute
)

// cpuMeter makes a rate of the readings of a CPU counter, and keeps the counter from going back: where it is summed up
// over living processes it would, when one of them ends.
type cpuMeter struct {
	mu           sync.Mutex
	older, newer cpuSample // older is at least rateWindow older than newer; the zero value is none
	high         uint64    // the most that was ever read
}

type cpuSample struct {
	at    time.Time
	total uint64 // CPU time, ns
}

// observe takes in a reading. It returns the counter, and the use of CPU since an earlier reading, in nanoseconds a
// second; nil where no reading is of the right age. The kubelet makes do without that for containers, whose use it then
// computes for itself, but not for pods.
func (m *cpuMeter) observe(at time.Time, total uint64) (uint64, *uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	total = max(total, m.high)
	m.high = total
	base := m.newer
	if at.Sub(base.at) < rateWindow {
		base = m.older
	} else {
		m.older, m.newer = m.newer, cpuSample{at, total}
	}
	since := at.Sub(base.at)
	if base.at.IsZero() || since < rateWindow || since > rateAge {
		return total, nil
	}
	rate := uint64(float64(total-base.total) / since.Seconds())
	return total, &rate
}

// last is the counter as it was read last.
func (m *cpuMeter) last() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.high
}
