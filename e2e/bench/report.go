package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// raw is what is kept of a run, as JSON.
type raw struct {
	Began   time.Time
	Took    string
	Machine string
	Data    string // directory of the nodes' data
	Remarks []string
	Figures figures // row → runtime → values, in the row's unit
	Units   map[string]string
}

// report writes the figures, the table and the picture to a directory, and prints the table.
func (c *comparison) report(dir string, began time.Time) error {
	r := raw{Began: began, Took: time.Since(began).Round(time.Second).String(), Machine: machine(), Data: c.dir, Remarks: c.remarks, Figures: c.got, Units: map[string]string{}}
	for _, row := range table() {
		r.Units[row.key] = row.unit
	}
	r.adopt(c.earlier)
	r.Figures.derive()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	names := make([]string, 0, len(c.nodes))
	for _, n := range c.nodes {
		names = append(names, n.name)
	}
	markdown := r.markdown(names)
	for name, content := range map[string]string{
		"figures-" + began.Format("20060102-150405") + ".json": string(text), "figures.json": string(text),
		"table.md": markdown, "ratios.svg": ratiosSVG(r.Figures, names)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	fmt.Print(markdown)
	fmt.Fprintln(os.Stderr, "raw figures, table and picture: "+dir)
	return nil
}

// adopt takes the rows of an earlier run that this one has not measured.
func (r *raw) adopt(earlier *raw) {
	if earlier == nil {
		return
	}
	for row, values := range earlier.Figures {
		if r.Figures[row] == nil {
			r.Figures[row] = values
		}
	}
	for _, remark := range earlier.Remarks {
		if !slices.Contains(r.Remarks, remark) {
			r.Remarks = append(r.Remarks, remark)
		}
	}
}

func readRaw(path string) (*raw, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &raw{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return r, nil
}

// machine describes where this ran.
func machine() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	cpu := runtime.GOARCH
	text, _ := os.ReadFile("/proc/cpuinfo")
	if _, rest, ok := strings.Cut(string(text), "model name\t: "); ok {
		cpu, _, _ = strings.Cut(rest, "\n")
	}
	return fmt.Sprintf("%d × %s, Linux %s", runtime.NumCPU(), cpu, unix.ByteSliceToString(u.Release[:]))
}

// markdown is the table: medians, 95th percentiles in brackets, and how many times better the first runtime is.
func (r raw) markdown(names []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; data in %s; %s, in %s\n\n", r.Machine, r.Data, r.Began.Format("2 January 2006"), r.Took)
	fmt.Fprintf(&b, "| median (p95) | %s | times better | aim |\n|---|%s---|---|\n", strings.Join(names, " | "), strings.Repeat("---|", len(names)))
	for _, row := range table() {
		values := r.Figures[row.key]
		ours := values[names[0]]
		if len(ours) == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s |", row.key)
		for _, name := range names {
			fmt.Fprintf(&b, " %s |", row.show(values[name]))
		}
		better := "–"
		var theirs float64
		if len(names) > 1 && len(values[names[1]]) > 0 {
			theirs = median(values[names[1]])
			better = fmt.Sprintf("%.1f", row.better(median(ours), theirs))
		}
		fmt.Fprintf(&b, " %s | %s |\n", better, row.verdict(median(ours), theirs))
	}
	for _, remark := range r.Remarks {
		fmt.Fprintf(&b, "\n%s\n", remark)
	}
	return b.String()
}

// show prints a row's values.
func (r row) show(v []float64) string {
	if len(v) == 0 {
		return "–"
	}
	m, p := median(v), p95(v)
	if r.more {
		p = quantile(v, 0.05) // the worse end
	}
	if len(v) == 1 {
		return r.one(m)
	}
	worse := r.one(p)
	if r.measure(m) == r.measure(p) {
		worse = strings.TrimSuffix(worse, " "+r.measure(p))
	}
	return fmt.Sprintf("%s (%s)", r.one(m), worse)
}

// one prints a value with its unit.
func (r row) one(v float64) string {
	switch unit := r.measure(v); unit {
	case "s":
		return fmt.Sprintf("%.2f s", v/1000)
	case "MiB":
		return fmt.Sprintf("%.1f MiB", v/1024)
	default:
		if v < 10 {
			return fmt.Sprintf("%.2f %s", v, unit)
		}
		return fmt.Sprintf("%.0f %s", v, unit)
	}
}

// measure is the unit in which a value is shown.
func (r row) measure(v float64) string {
	switch {
	case r.unit == "ms" && v >= 1000:
		return "s"
	case r.unit == "KiB" && v >= 10<<10:
		return "MiB"
	}
	return r.unit
}

// verdict tells the aim, and whether it is met.
func (r row) verdict(ours, theirs float64) string {
	var aim string
	switch {
	case r.most != 0 && r.more:
		aim = "≥ " + r.one(r.most)
	case r.most != 0:
		aim = "≤ " + r.one(r.most)
	case r.aim != 0 && theirs == 0:
		return fmt.Sprintf("%.3g ×", r.aim)
	case r.aim != 0:
		aim = fmt.Sprintf("%.3g ×", r.aim)
	default:
		return ""
	}
	if r.met(ours, theirs) {
		return aim + ", met"
	}
	return aim + ", **not met**"
}
