package main

import "slices"

// figures are the raw measurements: row → runtime → values.
type figures map[string]map[string][]float64

func (f figures) add(row, runtime string, value float64) {
	if f[row] == nil {
		f[row] = map[string][]float64{}
	}
	f[row][runtime] = append(f[row][runtime], value)
}

// derive adds the rows that follow from others: what a seccomp filter adds to a start, and how starts grow with 500 pods.
func (f figures) derive() {
	derived := func(row, from, beside string, of func(a, b float64) float64) {
		delete(f, row)
		for runtime, values := range f[from] {
			if base := f[beside][runtime]; len(values) > 0 && len(base) > 0 {
				f.add(row, runtime, of(median(values), median(base)))
			}
		}
	}
	derived(rowFilter, rowSeccomp, rowRunning, func(a, b float64) float64 { return a - b })
	derived(rowGrowth, rowLast, rowFirst, func(a, b float64) float64 { return a / b })
}

func median(v []float64) float64 { return quantile(v, 0.5) }
func p95(v []float64) float64    { return quantile(v, 0.95) }

// quantile is the smallest value that q of all values do not exceed.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[min(int(q*float64(len(s))), len(s)-1)]
}
