package keeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/wire"
)

func TestFormatterCutsAnyChunking(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 600, time.FixedZone("", 3600))
	long := strings.Repeat("é", maxLine/2)
	text := "a\n\n" + long + "\n" + long + "x\n" + long + long + "\nend"
	want := []string{"F a", "F ", "F " + long, "P " + long, "F x", "P " + long, "F " + long, "P end"}
	for _, size := range []int{1, 7, maxLine - 1, maxLine, maxLine + 1, len(text)} {
		var got []string
		writes := 0
		f := formatter{stream: "stderr", flush: func(b []byte) {
			writes++
			if b[len(b)-1] != '\n' {
				t.Errorf("size %d: a write ends inside a line", size)
			}
			for line := range strings.Lines(string(b)) {
				got = append(got, strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "2026-01-02T02:04:05.0000006Z stderr "))
			}
		}}
		for chunk := range slices.Chunk([]byte(text), size) {
			f.feed(now, chunk)
		}
		f.finish(now)
		if !slices.Equal(got, want) {
			t.Errorf("size %d: %d lines %.50q", size, len(got), got)
		}
		if size == len(text) && writes > 3 {
			t.Errorf("%d writes for one chunk", writes)
		}
	}
}

func TestFormatterKeepsNoLargeBuffers(t *testing.T) {
	f := formatter{stream: "stdout", flush: func([]byte) {}}
	f.feed(time.Now(), []byte(strings.Repeat("\n", chunkSize)))
	f.feed(time.Now(), []byte(strings.Repeat("x", maxLine)))
	f.feed(time.Now(), []byte("\n"))
	if f.out != nil || cap(f.pending) > 1<<10 {
		t.Errorf("out %v, pending %d", f.out != nil, cap(f.pending))
	}
}

// BenchmarkFormatter formats lines of 100 bytes and writes them to a file.
func BenchmarkFormatter(b *testing.B) {
	log, err := openLogFile("", filepath.Join(b.TempDir(), "log"), slog.Default())
	if err != nil {
		b.Fatal(err)
	}
	defer log.close()
	f := formatter{stream: "stdout", flush: log.write}
	chunk := []byte(strings.Repeat(strings.Repeat("x", 99)+"\n", chunkSize/100+1))[:chunkSize]
	b.SetBytes(chunkSize)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		f.feed(time.Now(), chunk)
		if n%4000 == 0 { // as rotation keeps it from filling the disk
			if err := log.file.Truncate(0); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func TestFollowTellsExitsThatTheJournalHasLetGo(t *testing.T) {
	k := &Keeper{journal: newJournal(), containers: map[string]*container{}}
	const count = 3 * journalSize
	for i := range count {
		c := newContainer(k, fmt.Sprintf("c%d", i))
		c.state.FinishedAt = time.Now()
		c.seq = k.journal.append(wire.EventExit, c.state)
		if i%2 == 0 { // the others are deleted
			k.containers[c.id] = c
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var got []uint64
	err := k.follow(ctx, 10, func(e wire.Event) error {
		if got = append(got, e.Seq); e.Seq == count {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || !slices.IsSorted(got) {
		t.Fatalf("%v, sorted %v", err, slices.IsSorted(got))
	}
	if want := journalSize + (count-journalSize-10)/2; len(got) != want || got[0] != 11 {
		t.Errorf("%d events from %d, want %d from 11", len(got), got[0], want)
	}
}

func TestFamilyIsAllDescendantsAndNoZombies(t *testing.T) {
	all := []proc{{pid: 2, parent: 1}, {pid: 10, parent: 2}, {pid: 7, parent: 10}, {pid: 6, parent: 7}, {pid: 8, parent: 7, zombie: true},
		{pid: 9, parent: 1}, {pid: os.Getpid(), parent: 7}}
	var pids []int
	for _, p := range family(all, func(p proc) bool { return p.pid == 10 }) {
		pids = append(pids, p.pid)
	}
	slices.Sort(pids)
	if !slices.Equal(pids, []int{6, 7, 10}) {
		t.Errorf("family %v", pids)
	}
}

func TestReadProcStandsAnyName(t *testing.T) {
	p, err := readProc(os.Getpid())
	if err != nil || p.pid != os.Getpid() || p.start == 0 || p.zombie {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestARecordIsOldOrNew(t *testing.T) {
	dir := t.TempDir()
	k := &Keeper{cfg: Config{RuntimeDir: dir}, journal: newJournal(), containers: map[string]*container{}, log: slog.New(slog.DiscardHandler)}
	if err := os.Mkdir(k.recordDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(k.recordDir(), name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.writeRecord(wire.State{ID: "a", FinishedAt: time.Now(), ExitCode: 3}); err != nil {
		t.Fatal(err)
	}
	write("b.json.tmp", `{"version":1,"sta`) // a crash in the middle of a write
	if err := k.loadRecords(); err != nil {
		t.Fatal(err)
	}
	if states := k.list(); len(k.containers) != 1 || k.containers["a"].snapshot().ExitCode != 3 {
		t.Errorf("loaded %v", states)
	}
	if left, _ := filepath.Glob(k.recordDir() + "/*.tmp"); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// TestARecordThatCannotBeReadIsSetAside: the others count, and the log says where it is.
func TestARecordThatCannotBeReadIsSetAside(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	k := &Keeper{cfg: Config{RuntimeDir: dir}, journal: newJournal(), containers: map[string]*container{}, log: slog.New(slog.NewTextHandler(&log, nil))}
	if err := os.MkdirAll(filepath.Join(k.recordDir(), "directory.json", "inside"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := k.writeRecord(wire.State{ID: "a", FinishedAt: time.Now(), ExitCode: 3}); err != nil {
		t.Fatal(err)
	}
	bad := map[string]string{"newer": `{"version":9,"state":{}}`, "torn": `{"version":1,"sta`, "empty": "", "noise": "\x00{]", "null": "null",
		"other": `{"version":1,"state":{"id":"a"}}`}
	for name, content := range bad {
		if err := os.WriteFile(k.recordPath(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bad["directory"] = ""
	for range 2 {
		if err := k.loadRecords(); err != nil {
			t.Fatal(err)
		}
	}
	if len(k.containers) != 1 || k.containers["a"].snapshot().ExitCode != 3 {
		t.Errorf("loaded %v", k.list())
	}
	for name := range bad {
		aside := k.recordPath(name) + ".unreadable"
		if _, err := os.Lstat(aside); err != nil || !strings.Contains(log.String(), aside) {
			t.Errorf("%s: %v; the log:\n%s", name, err, &log)
		}
	}
}

func TestOOMKilledReadsTheCgroupsCounter(t *testing.T) {
	for content, want := range map[string]bool{
		"low 0\nhigh 0\nmax 9\noom 3\noom_kill 1\noom_group_kill 0\n": true,
		"low 0\nhigh 0\nmax 9\noom 3\noom_kill 0\noom_group_kill 1\n": false,
		"": false,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := oomKilled(dir); got != want {
			t.Errorf("%q: %v", content, got)
		}
	}
	if oomKilled("") || oomKilled(t.TempDir()) {
		t.Error("an OOM kill without a memory controller")
	}
}

func TestTheComplaintOfAProgramIsOneSentence(t *testing.T) {
	for log, want := range map[string]string{
		`{"msg":"open executable","level":"error","time":"x"}` + "\n":                                     "open executable",
		`{"level":"warning","msg":"odd"}{"level":"error","msg":"first"}{"level":"error","msg":" last\n"}`: "last", // gVisor's has no newlines
		`{"level":"error","msg":"why"}` + "\n" + `{"level":"info","msg":"cleaned up"}` + "\n":             "why",
		`{"level":"info","msg":"only this"}`:                                                              "only this",
		"time=x level=error\nthe end of it\n":                                                             "the end of it", // a runtime without JSON
		"odd\n" + `{"level":"error","msg":"in between"}` + "\nend\n":                                      "in between",
		`{"level":"error","msg":"cut"}{"level":`:                                                          "cut",
		"":                                                                                                "",
	} {
		if got := lastError([]byte(log)); got != want {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
	end := errors.New("exit status 1")
	dir := t.TempDir()
	log, said := filepath.Join(dir, "log"), filepath.Join(dir, "said")
	if err := os.WriteFile(said, []byte("usage:\nunknown option --no\n\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(said)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := complaint(log, f, end); got.Error() != "unknown option --no" {
		t.Errorf("without a log: %v", got)
	}
	if got := complaint(log, nil, end); !errors.Is(got, end) {
		t.Errorf("without a word: %v", got)
	}
	if err := os.WriteFile(log, []byte(`{"level":"error","msg":"why"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := complaint(log, f, end); got.Error() != "why" {
		t.Errorf("with a log: %v", got)
	}
}

func TestAHelpTextTellsItsOptions(t *testing.T) {
	crun := "      --cgroup=PATH          sub-cgroup in the container\n  -p, --process=FILE         path\n      --pid-file=FILE\n"
	runc := "   --process value, -p value  path\n   --cgroup value   run the process in an (existing) sub-cgroup\n   --no-new-keyring   do not\n"
	runsc := "  -internal-pid-file string\n    \tfilename\n  -pid-file string\n"
	for _, c := range []struct {
		help, option string
		want         bool
	}{{crun, "--cgroup", true}, {runc, "--cgroup", true}, {runsc, "--cgroup", false}, {runc, "--no-new-keyring", true},
		{crun, "--no-new-keyring", false}, {runsc, "-internal-pid-file", true}, {crun, "--pid", false}} {
		if got := knows(c.help, c.option); got != c.want {
			t.Errorf("%s in %q: %v", c.option, c.help, got)
		}
	}
}

// TestAProgramThatHasEndedWasStarted: the init process passes the FIFO, the program runs and ends, and only then does
// the start get to read that it passed. Which of the two is seen first is chance: so many times.
func TestAProgramThatHasEndedWasStarted(t *testing.T) {
	e := &inProcess{dir: t.TempDir()}
	path := filepath.Join(e.dir, "exec.fifo")
	for range 3000 {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		init, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := init.Write([]byte("0")); err != nil {
			t.Fatal(err)
		}
		dead := make(chan struct{})
		close(dead)
		if err := e.start(dead); err != nil {
			t.Fatal(err)
		}
		init.Close()
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	dead := make(chan struct{})
	time.AfterFunc(10*time.Millisecond, func() { close(dead) })
	if err := e.start(dead); err == nil {
		t.Error("an init process that died before it passed was started")
	}
}

func TestUndoingALimitWritesWhatWasThere(t *testing.T) {
	for _, tc := range []struct {
		then, now string
		want      []string
	}{
		{"max\n", "7\n", []string{"max"}},
		{"max 100000\n", "20000 100000\n", []string{"max 100000"}},
		{"\n", "0-1\n", []string{""}},
		{"", "8:0 rbps=9 wbps=max riops=max wiops=max\n", []string{"8:0 rbps=max wbps=max riops=max wiops=max"}},
		{"8:0 rbps=5 wbps=max riops=max wiops=max\n", "8:0 rbps=9 wbps=7 riops=max wiops=max\n", []string{"8:0 rbps=5 wbps=max riops=max wiops=max"}},
		{"default 100\n", "default 50\n8:16 200\n", []string{"8:16 default", "default 100"}},
	} {
		if got := undoing(tc.then, tc.now); !slices.Equal(got, tc.want) {
			t.Errorf("from %q to %q: %q, want %q", tc.now, tc.then, got, tc.want)
		}
	}
}

func TestARuntimeIsAskedForItsOptionsUntilItAnswers(t *testing.T) {
	dir := t.TempDir()
	path, child := filepath.Join(dir, "runtime"), filepath.Join(dir, "child")
	r := &run{program: &program{keeper: &Keeper{}, runtime: wire.Runtime{Path: path}}, command: "exec"}
	answer := func(script string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path+".new", time.Time{}, time.Unix(1, 0)); err != nil { // the same program, for all one can see
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	for _, script := range []string{"kill -9 $$", "exit 1", "echo --other; kill -9 $$"} {
		if answer(script); r.takes("--option") {
			t.Errorf("%q takes it", script)
		}
	}
	// It helps by an error, and leaves a child that holds its output.
	answer(fmt.Sprintf("sleep 1000 & echo $! >%s; echo --option; exit 1", child))
	if !r.takes("--option") {
		t.Error("what was no answer is remembered")
	}
	if pid, err := readPid(child); err != nil {
		t.Error(err)
	} else if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Error(err)
	} else {
		_, _ = syscall.Wait4(pid, nil, 0, nil) // where this process is its reaper
	}
	if answer("echo --other"); !r.takes("--option") || r.takes("--other") {
		t.Error("an answer is not remembered")
	}
}

// TestAnExecOutlivesItsContainerInAHandover: one that was waited for while its container was deleted.
func TestAnExecOutlivesItsContainerInAHandover(t *testing.T) {
	for _, exited := range []bool{true, false} {
		k := newKeeper(Config{Log: slog.New(slog.DiscardHandler)})
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		a := &adopted{execs: map[*call]*session{}}
		err = k.adoptExec(a, &handedExec{Container: "gone", Caller: fds[0], Leader: handedProcess{Pid: 1 << 22}, Exited: exited, Code: 137})
		if (err == nil) != exited || exited != (len(a.execs) == 1) {
			t.Errorf("ended %v: %v, %d execs", exited, err, len(a.execs))
		}
		if err != nil && !errors.Is(err, wire.ErrNotFound) {
			t.Error(err)
		}
		for c := range a.execs {
			_ = c.conn.Close()
		}
		wire.CloseFiles(a.files)
		_ = unix.Close(fds[1])
		if !exited {
			_ = unix.Close(fds[0])
		}
	}
}

// TestARefusedBirthIsTold from a start that would fail in any way: TestWithoutClone3ContainersAreMovedToTheirCgroups has
// one of these from the kernel.
func TestARefusedBirthIsTold(t *testing.T) {
	for err, want := range map[error]bool{unix.ENOSYS: true, unix.EPERM: true, unix.EINVAL: true, unix.E2BIG: true, unix.EBUSY: true,
		unix.EOPNOTSUPP: true, unix.EAGAIN: false, unix.ENOMEM: false, unix.ENOENT: false} {
		if got := refusesBirth(&os.PathError{Op: "fork/exec", Path: "/x", Err: err}); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}
