package netslirp

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkAttachDetach reports the medians of both halves, with 20 other pods attached: with nothing else going on,
// and right after another pod's Detach, while the kernel still deletes its veth under the lock of the links.
func BenchmarkAttachDetach(b *testing.B) {
	l := newLab(b)
	n := l.open()
	for i := range 20 {
		l.attach(n, fmt.Sprint("neighbour", i))
	}
	for name, pause := range map[string]time.Duration{"quiet": 60 * time.Millisecond, "churn": 0} {
		b.Run(name, func(b *testing.B) {
			var attach, detach []time.Duration
			for b.Loop() {
				b.StopTimer()
				ns := newNetNS(b)
				time.Sleep(pause)
				b.StartTimer()
				start := time.Now()
				_, err := n.Attach(context.Background(), AttachRequest{PodID: "bench", NetNS: ns})
				attached := time.Now()
				must(b, err)
				must(b, n.Detach(context.Background(), "bench", ns))
				attach, detach = append(attach, attached.Sub(start)), append(detach, time.Since(attached))
				b.StopTimer()
				must(b, unix.Unmount(ns, unix.MNT_DETACH))
				b.StartTimer()
			}
			for name, d := range map[string][]time.Duration{"attach": attach, "detach": detach} {
				slices.Sort(d)
				b.ReportMetric(float64(d[len(d)/2].Microseconds()), name+"-p50-µs")
				b.ReportMetric(float64(d[len(d)*95/100].Microseconds()), name+"-p95-µs")
			}
		})
	}
}
