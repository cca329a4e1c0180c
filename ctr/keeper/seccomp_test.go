package keeper_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr"
)

// without is a profile that refuses some system calls with an error that the kernel would not give.
func without(calls ...string) *specs.LinuxSeccomp {
	refused := uint(unix.EXDEV)
	return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls: []specs.LinuxSyscall{{Names: calls, Action: specs.ActErrno, ErrnoRet: &refused}}}
}

// TestKeptFiltersFilter: a container, and what is executed in it, is refused the same before its profile's filter is kept
// and after, with and without no_new_privs, between which the filter is loaded at another time.
func TestKeptFiltersFilter(t *testing.T) {
	n := newNode(t)
	refused := func(what, said string) {
		t.Helper()
		if !strings.Contains(said, "cross-device link") {
			t.Errorf("%s: mkdir says %q", what, said)
		}
	}
	for round := range 3 {
		for _, strict := range []bool{false, true} {
			id := fmt.Sprintf("c%d-%v", round, strict)
			s := sh("mkdir /tmp/d 2>&1; ls /proc/self/fd | wc -l; sleep 100")
			s.Linux.Seccomp = without("mkdir", "mkdirat")
			s.Process.NoNewPrivileges = strict
			n.create(id, s)
			n.start(id)
			eventually(t, "two lines", func() bool { return len(n.lines(id)) >= 2 })
			lines := n.lines(id)
			refused(id, lines[0])
			if !strings.HasSuffix(lines[1], " 4") {
				t.Errorf("%s: not 4 descriptors (three, and that of the directory): %q", id, lines[1])
			}
			outR, outW := pipe(t)
			p := process("/bin/sh", "-c", "mkdir /tmp/d; ls /proc/self/fd | wc -l >&2")
			p.NoNewPrivileges = strict
			x, err := n.Exec(context.Background(), ctr.ExecRequest{ContainerID: id, Process: p, Streams: ctr.Streams{Stderr: outW}})
			if err != nil {
				t.Fatal(err)
			}
			outW.Close()
			said := readAll(t, outR)
			refused("exec in "+id, said)
			if !strings.HasSuffix(strings.TrimSpace(said), "4") {
				t.Errorf("exec in %s: not 4 descriptors: %q", id, said)
			}
			_, _ = x.Wait(context.Background())
			_ = x.Close()
			n.delete(id)
		}
		eventually(t, "a kept filter", func() bool { return n.keeper.KeptFilters() == 1 })
	}
}

// TestEachProfileHasItsOwnFilter: two profiles that differ in one rule do not get each other's.
func TestEachProfileHasItsOwnFilter(t *testing.T) {
	n := newNode(t)
	for round := range 2 {
		for i, calls := range [][]string{{"mkdir", "mkdirat"}, {"mkdir", "mkdirat", "symlink", "symlinkat"}} {
			s := sh("ln -s a /tmp/l; exit $?")
			s.Linux.Seccomp = without(calls...)
			if got := n.run(fmt.Sprintf("c%d-%d", round, i), s).ExitCode; got != i {
				t.Errorf("round %d, profile %d: ln ends with %d", round, i, got)
			}
			n.delete(fmt.Sprintf("c%d-%d", round, i))
		}
		eventually(t, "two kept filters", func() bool { return n.keeper.KeptFilters() == 2 })
	}
}
