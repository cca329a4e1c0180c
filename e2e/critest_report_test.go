package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// suiteReport is what is read of ginkgo's report (github.com/onsi/ginkgo/v2/types.Report).
type suiteReport struct {
	SuiteConfig                struct{ RandomSeed int64 }
	SpecialSuiteFailureReasons []string
	SpecReports                []specReport
	ended                      error // how the program did
}

// specReport is a spec, or a part of the suite that is around all specs.
type specReport struct {
	ContainerHierarchyTexts    []string
	LeafNodeType, LeafNodeText string
	State                      string
	Failure                    struct {
		Message, ForwardedPanic string
		Location                struct {
			FileName   string
			LineNumber int
		}
	}
	CapturedGinkgoWriterOutput string
}

func readReport(file string) (suiteReport, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return suiteReport{}, err
	}
	var suites []suiteReport
	if err := json.Unmarshal(raw, &suites); err != nil {
		return suiteReport{}, fmt.Errorf("read %s: %w", file, err)
	}
	if len(suites) != 1 {
		return suiteReport{}, fmt.Errorf("%s is of %d suites, want one", file, len(suites))
	}
	return suites[0], nil
}

func (s specReport) name() string {
	return strings.TrimSpace(strings.Join(append(append([]string{}, s.ContainerHierarchyTexts...), s.LeafNodeText), " "))
}

// why is the message of a failure, where it was, and what the spec had written until then.
func (s specReport) why() string {
	at := s.Failure.Location
	return strings.TrimSpace(fmt.Sprintf("%s: %s %s\nat %s:%d\n%s", s.State, s.Failure.Message, s.Failure.ForwardedPanic,
		at.FileName, at.LineNumber, tail(s.CapturedGinkgoWriterOutput, 30)))
}

// skip is a spec that was not run.
type skip struct {
	name, reason string
	excused      bool
}

// verdict sorts the specs of a run.
type verdict struct {
	passed, failed []specReport
	skipped        []skip
	unselected     int // by the focus
	notes          []string
}

// benchmarks are no specs of what a runtime does: critest leaves them out by this pattern unless it is called with
// -benchmark, and then it runs nothing else.
const benchmarks = "benchmark"

// judge excuses a skip where the harness has asked for it, or critest has a reason that this machine gives.
func judge(report suiteReport, omit []omission, excuses []*regexp.Regexp) verdict {
	v := verdict{notes: report.SpecialSuiteFailureReasons}
	for _, s := range report.SpecReports {
		isSpec := s.LeafNodeType == "It"
		switch {
		case s.State == "passed":
			if isSpec {
				v.passed = append(v.passed, s)
			}
		case s.State != "skipped" && s.State != "pending":
			v.failed = append(v.failed, s)
		case !isSpec:
		case s.Failure.Message != "":
			reason := skip{name: s.name(), reason: s.Failure.Message}
			for _, e := range excuses {
				reason.excused = reason.excused || e.MatchString(reason.reason)
			}
			v.skipped = append(v.skipped, reason)
		default:
			v.leftOut(s.name(), omit)
		}
	}
	return v
}

// leftOut files a spec that a pattern has excluded.
func (v *verdict) leftOut(name string, omit []omission) {
	for _, o := range append([]omission{{benchmarks, "a benchmark, which critest runs only by itself (-benchmark)"}}, omit...) {
		if regexp.MustCompile(o.pattern).MatchString(name) {
			v.skipped = append(v.skipped, skip{name, o.reason, true})
			return
		}
	}
	if critestFocus != "" {
		v.unselected++
		return
	}
	v.skipped = append(v.skipped, skip{name: name, reason: "for no reason that is known"})
}

// summary is for people: every skip and failure by name, and the counts in the last line.
func (v verdict) summary() string {
	var b strings.Builder
	for _, s := range v.skipped {
		fmt.Fprintf(&b, "skipped: %s: %s\n", s.name, s.reason)
	}
	for _, f := range v.failed {
		fmt.Fprintf(&b, "failed: %s\n", f.name())
	}
	for _, n := range v.notes {
		fmt.Fprintf(&b, "critest: %s\n", n)
	}
	if v.unselected > 0 {
		fmt.Fprintf(&b, "%d specs are outside of the focus %q\n", v.unselected, critestFocus)
	}
	fmt.Fprintf(&b, "one digest of critest's is changed: that of the image test-image-digest, whose content only its makers have\n")
	fmt.Fprintf(&b, "%d passed, %d failed, %d skipped\n", len(v.passed), len(v.failed), len(v.skipped))
	return b.String()
}

// TestJudge: a spec that does not run is a failure unless this machine is the reason, or the harness has asked for it.
func TestJudge(t *testing.T) {
	spec := func(name, state, message string) specReport {
		s := specReport{LeafNodeType: "It", LeafNodeText: name, State: state}
		s.Failure.Message = message
		return s
	}
	around := specReport{LeafNodeType: "BeforeSuite", State: "panicked"}
	v := judge(suiteReport{SpecReports: []specReport{
		spec("a", "passed", ""), {LeafNodeType: "BeforeSuite", State: "passed"}, around,
		spec("b", "failed", "no"), spec("c", "timedout", ""), spec("d", "interrupted", ""),
		spec("benchmark e", "skipped", ""), spec("OOM f", "skipped", ""), spec("g", "skipped", "this kernel has none"),
		spec("h", "skipped", "the runtime does not want to"), spec("i", "skipped", ""), spec("j", "pending", ""),
	}}, []omission{{"OOM", "no controller"}}, []*regexp.Regexp{regexp.MustCompile("^this kernel has none$")})
	if len(v.passed) != 1 || len(v.failed) != 4 || len(v.skipped) != 6 {
		t.Errorf("%d passed, %d failed, %d skipped", len(v.passed), len(v.failed), len(v.skipped))
	}
	want := map[string]bool{"benchmark e": true, "OOM f": true, "g": true, "h": false, "i": false, "j": false}
	for _, s := range v.skipped {
		if excused, ok := want[s.name]; !ok || excused != s.excused || s.reason == "" {
			t.Errorf("%s is excused: %v, for the reason %q", s.name, s.excused, s.reason)
		}
	}
	if !strings.HasSuffix(v.summary(), "\n1 passed, 4 failed, 6 skipped\n") {
		t.Errorf("the summary is:\n%s", v.summary())
	}
}
