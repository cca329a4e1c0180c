package main

import (
	"encoding/xml"
	"strings"
	"testing"
)

func TestQuantiles(t *testing.T) {
	var v []float64
	for i := range 100 {
		v = append(v, float64(99-i))
	}
	if m, p := median(v), p95(v); m != 50 || p != 95 {
		t.Errorf("median %v, p95 %v", m, p)
	}
	if one := p95([]float64{7}); one != 7 {
		t.Errorf("p95 of one value: %v", one)
	}
}

// sample has a row of times, one of a throughput, and one that the peer does not have.
func sample() figures {
	f := figures{}
	for _, v := range []float64{10, 20, 30} {
		f.add(rowRunning, "ours", v)
		f.add(rowRunning, "theirs", 9*v)
		f.add(rowLog, "ours", 100*v)
		f.add(rowLog, "theirs", 50*v)
	}
	f.add(rowRestart, "ours", 61)
	return f
}

func TestTableTellsWhatIsMet(t *testing.T) {
	table := raw{Figures: sample()}.markdown([]string{"ours", "theirs"})
	for _, want := range []string{
		"| RunPodSandbox to running | 20 ms (30) | 180 ms (270) | 9.0 | 8 ×, met |",
		"| log of lines of 100 bytes | 2000 MB/s (1000) | 1000 MB/s (500) | 2.0 | ≥ 300 MB/s, met |",
		"| " + rowRestart + " | 61 ms | – | – | ≤ 60 ms, **not met** |",
	} {
		if !strings.Contains(table, want+"\n") {
			t.Errorf("the table has no line %q:\n%s", want, table)
		}
	}
	if strings.Contains(table, rowSix) {
		t.Errorf("the table has a row that was not measured:\n%s", table)
	}
}

func TestDerivedRows(t *testing.T) {
	f := figures{
		rowRunning: {"ours": {10, 12, 14}}, rowSeccomp: {"ours": {11, 13.5, 20}},
		rowFirst: {"ours": {10}, "theirs": {100}}, rowLast: {"ours": {15}}, rowGrowth: {"ours": {9, 9}},
	}
	f.derive()
	if got := f[rowFilter]["ours"]; len(got) != 1 || got[0] != 1.5 {
		t.Errorf("%s: %v, want 1.5", rowFilter, got)
	}
	if got := f[rowGrowth]["ours"]; len(got) != 1 || got[0] != 1.5 {
		t.Errorf("%s: %v, want 1.5", rowGrowth, got)
	}
	if got := f[rowGrowth]["theirs"]; got != nil {
		t.Errorf("%s of a runtime without %s: %v", rowGrowth, rowLast, got)
	}
}

func TestEarlierFiguresStayWhereThereAreNoNewer(t *testing.T) {
	r := raw{Figures: figures{rowLog: {"ours": {1}}}}
	r.adopt(&raw{Figures: sample(), Remarks: []string{"noisy"}})
	if got := r.Figures[rowLog]["ours"]; len(got) != 1 {
		t.Errorf("newer figures were replaced: %v", got)
	}
	if len(r.Figures[rowRunning]["theirs"]) != 3 || len(r.Remarks) != 1 {
		t.Errorf("earlier figures are missing: %v, %q", r.Figures, r.Remarks)
	}
}

func TestPictureHasABarARow(t *testing.T) {
	picture := ratiosSVG(sample(), []string{"ours", "theirs"})
	if err := xml.Unmarshal([]byte(picture), new(struct{})); err != nil {
		t.Errorf("not XML: %v", err)
	}
	if bars := strings.Count(picture, `height="12"`); bars != 2 {
		t.Errorf("%d bars, want one for each row that both have", bars)
	}
}
