package cmd_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/coracle-cri/coracle"
	tags   = "seccomp,no_gvisortapvsock,no_vpnkit,no_lxcusernic"
)

// below lists, for each folder, the folders that its packages may import besides their own. A folder that is not
// here may import no other, and may be imported by none.
var below = map[string][]string{
	"cmd":      {"pod", "ctr", "netslirp", "images", "cgroupv2", "rootless"},
	"pod":      {"ctr", "netslirp", "images", "cgroupv2"},
	"ctr":      {},
	"netslirp": {},
	"images":   {},
	"cgroupv2": {},
	"rootless": {},
	"e2e":      {"cmd"}, // a program that takes every process lives as the node does
	"scripts":  {"e2e"}, // what takes a cluster down removes files of subordinate ids as the tests do
}

// within lists, for a package with neighbours in its folder, those that it may import: the wire is the seam of the
// process boundary, and neither end may reach across it.
var within = map[string][]string{
	"ctr":                {"ctr/wire"},
	"ctr/wire":           {},
	"ctr/keeper/filters": {},
	"ctr/keeper":         {"ctr/wire", "ctr/keeper/filters"},
}

// forbidden names what must not be reached, directly or not, from the packages that the keeper consists of.
var forbidden = map[string][]string{
	"ctr/wire":   {module + "/ctr", "k8s.io/cri-api"},
	"ctr/keeper": {module + "/ctr", "k8s.io/cri-api"},
}

// onlyIn names modules that packages of one folder alone may import.
var onlyIn = map[string]string{
	"github.com/opencontainers/runc": "ctr",
}

// testOnly are imported by test files alone.
var testOnly = []string{module + "/rootless/nstest", module + "/images/protofuzz"}

// anywhere may be imported by every package, and imports nothing of ours: the first is nothing outside of tests.
var anywhere = []string{module + "/e2e/crash", module + "/rootless/peercred"}

// pkg is what `go list` says of a package's non-test files: direct imports, and everything reached by them.
type pkg struct {
	ImportPath    string
	Imports, Deps []string
}

func (p pkg) path() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

func folder(path string) string {
	top, _, _ := strings.Cut(path, "/")
	return top
}

// under tells whether an import path is that of a module or below it.
func under(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func violations(pkgs []pkg) []string {
	var found []string
	for _, p := range pkgs {
		for _, imported := range p.Imports {
			if why := arrow(p.path(), imported); why != "" {
				found = append(found, fmt.Sprintf("%s imports %s: %s", p.ImportPath, imported, why))
			}
		}
		for _, reached := range p.Deps {
			for _, root := range forbidden[p.path()] {
				// Of ctr only the package itself is meant: ctr/wire lies below it.
				if reached == root || (!under(root, module) && under(reached, root)) {
					found = append(found, fmt.Sprintf("%s reaches %s: it is part of the keeper", p.ImportPath, reached))
				}
			}
		}
	}
	return found
}

// arrow says what is wrong with a direct import; "" where nothing is.
func arrow(from, imported string) string {
	for root, home := range onlyIn {
		if under(imported, root) && folder(from) != home {
			return "only " + home + " may"
		}
	}
	to, ours := strings.CutPrefix(imported, module+"/")
	switch {
	case !ours || slices.Contains(anywhere, imported):
		return ""
	case slices.Contains(testOnly, imported):
		return "it is for tests"
	case folder(from) != folder(to):
		if !slices.Contains(below[folder(from)], folder(to)) {
			return "the star has no such arrow"
		}
	default:
		if allowed, listed := within[from]; listed && !slices.Contains(allowed, to) {
			return "it lies on the other side of the wire"
		}
	}
	return ""
}

// list asks the go command for every package of the module.
func list(t *testing.T, arch string) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-buildvcs=false", "-tags="+tags, "-json=ImportPath,Imports,Deps", module+"/...")
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=1")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatalf("parse go list: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

// touch looks at every folder of the module. The go command keeps a test's result for as long as the files that
// the test itself opened are the same, and does not see those that a `go list` below it opens.
func touch(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && path != ".." {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatalf("walk the module: %v", err)
	}
}

func TestImportStar(t *testing.T) {
	touch(t)
	for _, arch := range []string{"amd64", "arm64"} {
		pkgs := list(t, arch)
		if !slices.ContainsFunc(pkgs, func(p pkg) bool { return p.path() == "cgroupv2" }) {
			t.Fatalf("%s: go list shows no package of the module", arch)
		}
		for _, v := range violations(pkgs) {
			t.Errorf("%s: %s", arch, v)
		}
	}
}

// TestImportStarSees breaks each rule once: a check that cannot fail proves nothing.
func TestImportStarSees(t *testing.T) {
	const runc = "github.com/opencontainers/runc/libcontainer"
	tests := []struct {
		from string
		to   string
		deps string
		bad  bool
	}{
		{from: "cmd/coracle", to: module + "/pod"},
		{from: "cmd/coracle", to: module + "/rootless"},
		{from: "cmd/coracle-keeper", to: module + "/ctr/keeper"},
		{from: "pod", to: module + "/images"},
		{from: "ctr", to: module + "/ctr/wire"},
		{from: "images", to: anywhere[0]},
		{from: "netslirp", to: anywhere[1]},
		{from: "ctr/wire", to: anywhere[1]},
		{from: "ctr/keeper", to: module + "/ctr/wire", deps: module + "/ctr/wire"},
		{from: "ctr/keeper", to: runc},
		{from: "ctr", to: "k8s.io/cri-api/pkg/apis/runtime/v1", deps: "k8s.io/cri-api/pkg/apis/runtime/v1"},
		{from: "pod", to: module + "/cmd/coracle", bad: true},
		{from: "pod", to: module + "/rootless", bad: true},
		{from: "images", to: module + "/netslirp", bad: true},
		{from: "images", to: module + "/pod", bad: true},
		{from: "cgroupv2", to: module + "/ctr/wire", bad: true},
		{from: "rootless", to: module + "/cgroupv2", bad: true},
		{from: "images", to: testOnly[0], bad: true},
		{from: "e2e/fixture", to: module + "/pod", bad: true},
		{from: "cmd/coracle", to: module + "/e2e", bad: true},
		{from: "e2e/crash", to: module + "/pod", bad: true},
		{from: "rootless/peercred", to: module + "/pod", bad: true},
		{from: "ctr", to: module + "/ctr/keeper", bad: true},
		{from: "ctr/keeper", to: module + "/ctr", bad: true},
		{from: "ctr/wire", to: module + "/ctr/keeper", bad: true},
		{from: "pod", to: runc, bad: true},
		{from: "cmd/coracle-keeper", to: runc + "/nsenter", bad: true},
		{from: "ctr/keeper", deps: "k8s.io/cri-api/pkg/apis/runtime/v1", bad: true},
		{from: "ctr/wire", deps: module + "/ctr", bad: true},
	}
	for _, test := range tests {
		p := pkg{ImportPath: module + "/" + test.from, Imports: []string{test.to}, Deps: []string{test.deps}}
		if found := violations([]pkg{p}); (len(found) > 0) != test.bad {
			t.Errorf("%s → %s %s: found %q, want a violation: %v", test.from, test.to, test.deps, found, test.bad)
		}
	}
}
