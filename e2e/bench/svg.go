package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// ratiosSVG draws how many times better the first runtime is than the second, one bar a row, on a logarithmic scale. The
// aim, where it is one of times, is a line across the bar.
func ratiosSVG(got figures, names []string) string {
	const left, width, line, top = 380, 420, 18, 46
	if len(names) < 2 {
		return `<svg xmlns="http://www.w3.org/2000/svg"/>` + "\n"
	}
	var bars strings.Builder
	x := func(ratio float64) float64 { // 1/4 … 64
		return left + width*(math.Log2(min(max(ratio, 0.25), 64))+2)/8
	}
	y := top
	for _, r := range table() {
		ours, theirs := got[r.key][names[0]], got[r.key][names[1]]
		if len(ours) == 0 || len(theirs) == 0 {
			continue
		}
		ratio := r.better(median(ours), median(theirs))
		color := "#2a7f4f"
		if ratio < 1 {
			color = "#b3423a"
		}
		from, to := min(x(1), x(ratio)), max(x(1), x(ratio))
		fmt.Fprintf(&bars, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%.1f" y="%d" width="%.1f" height="12" fill="%s"/><text x="%.1f" y="%d">%.1f</text>`+"\n",
			left-76, y+10, html.EscapeString(r.key), from, y, max(to-from, 1), color, x(max(ratio, 1))+5, y+10, ratio)
		if r.aim > 0 {
			fmt.Fprintf(&bars, `<path d="M%.1f %dv16" stroke="#222" stroke-width="2"/>`+"\n", x(r.aim), y-2)
		}
		y += line
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">`+"\n", left+width+50, y+10)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/><text x="10" y="18" font-size="13">How many times better %s is than %s (line: the aim)</text>`+"\n",
		html.EscapeString(names[0]), html.EscapeString(names[1]))
	for _, tick := range []float64{0.25, 0.5, 1, 2, 4, 8, 16, 32, 64} {
		fmt.Fprintf(&b, `<path d="M%.1f 38V%d" stroke="#ddd"/><text x="%.1f" y="34" text-anchor="middle" fill="#666">%g</text>`+"\n", x(tick), y, x(tick), tick)
	}
	b.WriteString(bars.String())
	b.WriteString("</svg>\n")
	return b.String()
}
