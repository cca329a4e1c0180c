package keeper_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coracle-cri/coracle/ctr"
)

// runtimeOfTests is what newNode's containers run by; nil is libcontainer in the keeper.
var runtimeOfTests *ctr.Runtime

// inCgroups gives a cgroup to each container of newNode's that asks for none.
var inCgroups bool

// crun finds crun, which `make test` installs.
func crun(t *testing.T) *ctr.Runtime {
	t.Helper()
	path, err := exec.LookPath("crun")
	if err != nil && os.Getenv("CORACLE_TEST_WHOLE") != "" {
		t.Fatal("crun is missing, which scripts/setup.sh --test installs")
	}
	if err != nil {
		t.Skip("crun is missing; to install it, run: scripts/setup.sh --test")
	}
	return &ctr.Runtime{Path: path}
}

// said is what is said of every container, whoever makes its processes.
var said = []struct {
	name string
	run  func(*testing.T)
}{
	{"lifecycle", TestAContainerIsCreatedStartedEndedAndDeleted},
	{"signals", TestSignalsReachTheContainer},
	{"created", TestACreatedContainerCanBeKilledAndDeleted},
	{"cannot start", TestWhatCannotStartSaysWhyAndLeavesNothing},
	{"events", TestEventsAreReplayedInOrder},
	{"node's pid namespace", TestProcessesOfASharedPidNamespaceEndWithTheirContainer},
	{"pod's pid namespace", TestAPodsPidNamespaceOutlivesOneContainer},
	{"orphans", TestOrphansAreReapedAndNoStatusIsStolen},
	{"held pipe", TestAnExitIsToldThoughAnotherProcessHoldsThePipe},
	{"exec", TestExecHasItsStreamsAndExitCode},
	{"user", TestAUserThatIsNotRootCanOpenItsStreams},
	{"exec that cannot start", TestExecThatCannotStartSaysWhy},
	{"exec in a terminal", TestExecHasATerminalThatResizes},
	{"exec given up", TestAGivenUpExecIsKilledWithAllItsProcesses},
	{"background", TestWhatAnExecLeavesInTheBackgroundGoesOn},
	{"execs end", TestExecsEndWithTheirContainer},
	{"execs race", TestExecsRaceWithTheEndOfTheirContainer},
	{"cgroup", TestACgroupTellsTheProcessesOfAContainer},
	{"exec's cgroup", TestAnExecHasACgroupOfItsOwn},
	{"update", TestUpdateSetsAllLimitsOrNone},
	{"attach", TestAttachReadsAndWrites},
	{"stdin once", TestStdinOnceClosesStdinWithTheFirstAttach},
	{"slow reader", TestAnAttachedReaderThatStopsDoesNotStopTheLog},
	{"terminal", TestAContainerHasATerminal},
	{"log lines", TestLongAndUnendedLinesArePartial},
	{"rotation", TestRotationLosesAndDoublesNoLine},
	{"full disk", TestAFullDiskStopsTheLogAndNotTheContainer},
	{"no log", TestNoLogIsKeptWhereNoneIsAskedFor},
	{"keys", TestContainersTakeNothingOfTheKeyQuota},
	{"propagation", TestMountsPropagateAsTheSpecSays},
	{"daemon", TestTheDaemonIsStartedAgainAndContainersGoOn},
	{"shutdown", TestShutdownKillsAllAndTheNextKeeperKnowsTheEnds},
	{"killed keeper", TestAKilledKeeperLeavesNoLieOnDisk},
	{"replaced keeper", TestAReplacedKeeperKeepsEverything},
	{"ends and replacements", TestContainersThatEndWhileTheKeeperIsReplaced},
}

// TestTheSameByAnOCIRuntime runs what is said of libcontainer's containers on those of a runtime program.
func TestTheSameByAnOCIRuntime(t *testing.T) {
	runtimeOfTests = crun(t)
	defer func() { runtimeOfTests = nil }()
	for _, test := range said {
		t.Run(test.name, test.run)
	}
}

// TestTheSameInACgroup runs it on containers that have a cgroup, and so are made by birth.
func TestTheSameInACgroup(t *testing.T) {
	delegated(t)
	inCgroups = true
	defer func() { inCgroups = false }()
	for _, test := range said {
		if test.name != "killed keeper" { // nobody else takes its cgroups away
			t.Run(test.name, test.run)
		}
	}
	t.Run("seccomp", TestKeptFiltersFilter)
	t.Run("seccomp profiles", TestEachProfileHasItsOwnFilter)
	t.Run("hooks", TestHooksOfACreationAreRun)
}

// TestARuntimeThatFailsSaysWhyAndLeavesNothing: programs that are none, or break what they promise.
func TestARuntimeThatFailsSaysWhyAndLeavesNothing(t *testing.T) {
	n := newNode(t)
	script := func(text string) string {
		path := filepath.Join(n.dir, "runtime")
		// A new file each time: to write one that is still executed is ETXTBSY.
		_ = os.Remove(path)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n[ \"$7\" = create ] || exit 0\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tc := range map[string]struct{ path, script, want string }{
		"relative":     {path: "crun", want: "not absolute"},
		"missing":      {path: "/nowhere/crun", want: "/nowhere/crun: no such file"},
		"fails":        {script: "echo usage >&2; echo what is it >&2; exit 3", want: "create: what is it"},
		"says nothing": {script: "exit 3", want: "exit status 3"},
		"logs":         {script: `echo '{"level":"error","msg":"the reason"}' > "$4"; echo noise >&2; exit 3`, want: "create: the reason"},
		"no pid":       {script: "exit 0", want: "no such file"},
		"foreign pid": {script: `while [ "$1" != --pid-file ]; do shift; done; echo 1 > "$2"`,
			want: "process 1, which it names, is no child of the keeper"},
	} {
		path := tc.path
		if path == "" {
			path = script(tc.script)
		}
		_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "c1", Spec: sh("true"), Runtime: &ctr.Runtime{Path: path}})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
		if left, _ := filepath.Glob(n.dir + "/keeper/bundles/*"); len(left) != 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
}

// TestAContainerOutlivesItsRuntimesProgram: an upgrade that fails half-way must not leave what nobody can remove.
func TestAContainerOutlivesItsRuntimesProgram(t *testing.T) {
	program, err := os.ReadFile(crun(t).Path)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t)
	path := filepath.Join(n.dir, "crun")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	spec := sh("exit 5")
	if cgroups {
		inCgroup(spec, "/gone")
	}
	n.create("c1", spec, func(r *ctr.CreateRequest) { r.Runtime = &ctr.Runtime{Path: path} })
	n.start("c1")
	if s := n.exit("c1"); s.ExitCode != 5 {
		t.Errorf("exit %+v", s)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	n.delete("c1")
	for _, dir := range []string{"bundles", "oci"} {
		if left, _ := filepath.Glob(filepath.Join(n.dir, "keeper", dir, "*")); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	}
}
