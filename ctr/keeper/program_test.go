package keeper_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/coracle-cri/coracle/ctr"
)

// runtimeOfTests is what newNode's containers run by; nil is libcontainer in the keeper.
var runtimeOfTests *ctr.Runtime

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

// TestTheSameByAnOCIRuntime runs what is said of libcontainer's containers on those of a runtime program.
func TestTheSameByAnOCIRuntime(t *testing.T) {
	runtimeOfTests = crun(t)
	defer func() { runtimeOfTests = nil }()
	for _, test := range []struct {
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
	} {
		t.Run(test.name, test.run)
	}
}
