package keeper_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr"
)

// faulty is crun which, where FAULT has the name of one, comes to grief after its work is done.
const faulty = `#!/bin/sh
# Called "simple", it does not know cgroups below a container's.
[ "${0##*/}-$2" != simple---help ] || { %[1]s "$@" | grep -v -e --cgroup; exit; }
fault=$(cat %[2]s 2>/dev/null)
# --root ROOT --log FILE --log-format json COMMAND
[ "$7-$fault" != "$7-" ] && [ "${fault%%%%-*}" = "$7" ] || exec %[1]s "$@"
root=$2
for arg; do
	shift
	case $last in
	--pid-file) pids=$arg ;;
	--process) process=$arg ;;
	esac
	last=$arg
	case $fault-$arg in
	exec-terminal---console-socket) skip=yes; continue ;;
	esac
	[ "$skip" ] || set -- "$@" "$arg"
	skip=
done
[ $fault != exec-terminal ] || sed -i 's/"terminal":true/"terminal":false/' $process
%[1]s "$@" || exit
case $fault in
*-killed) kill -9 $$ ;;
*-forgotten) (trap '' TERM; exec sleep 4243) & rm -r $root/c1; kill -9 $$ ;;
*-pid) echo none > $pids ;;
esac
`

func faultyRuntimes(t *testing.T, dir string) (paths []string, fault func(string)) {
	t.Helper()
	name := filepath.Join(dir, "fault")
	for _, program := range []string{"faulty", "simple"} {
		path := filepath.Join(dir, program)
		if err := os.WriteFile(path, fmt.Appendf(nil, faulty, crun(t).Path, name), 0o755); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths, func(fault string) {
		if err := os.WriteFile(name, []byte(fault), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// eachStray runs do for containers whose processes are told from others' by different means.
func eachStray(t *testing.T, do func(t *testing.T, n *node, rt *ctr.Runtime, s *specs.Spec, fault func(string))) {
	t.Helper()
	n := newNode(t)
	paths, fault := faultyRuntimes(t, n.dir)
	for _, path := range paths {
		rt := &ctr.Runtime{Path: path}
		for kind, s := range map[string]*specs.Spec{"own pid namespace": sh("sleep 1000"), "node's": pidNamespace(sh("sleep 1000"), "")} {
			if cgroups { // else crun would make one of its own choice
				inCgroup(s, "/c1")
			}
			t.Run(filepath.Base(path)+", "+kind, func(t *testing.T) { do(t, n, rt, s, fault) })
		}
	}
}

func TestAFailedExecLeavesNoProcess(t *testing.T) {
	eachStray(t, func(t *testing.T, n *node, rt *ctr.Runtime, s *specs.Spec, fault func(string)) {
		ctx := context.Background()
		fault("")
		n.create("c1", s, func(r *ctr.CreateRequest) { r.Runtime = rt })
		n.start("c1")
		other, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", Process: process("sleep", "4240")})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "another exec runs", func() bool { return running("sleep 4240") == 1 })
		for name, want := range map[string]string{"exec-killed": "signal: killed", "exec-terminal": "terminal", "exec-pid": "none"} {
			fault(name)
			s, err := n.Exec(ctx, ctr.ExecRequest{ContainerID: "c1", TTY: name == "exec-terminal",
				Process: process("/bin/sh", "-c", "sleep 4241 & exec sleep 4242")})
			if err == nil {
				t.Fatal(errors.Join(errors.New("it has not failed"), s.Close()))
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q in it", name, err, want)
			}
			if running("sleep 4241")+running("sleep 4242") > 0 {
				t.Errorf("%s: left:\n%s", name, processes())
			}
		}
		if running("sleep 4240") != 1 || !n.state("c1").Running() {
			t.Error("the other processes of the container have ended too")
		}
		if dirs, _ := filepath.Glob("/sys/fs/cgroup/c1/exec-*"); cgroups && len(dirs) != 1 {
			t.Errorf("cgroups %v", dirs)
		}
		if err := other.Close(); err != nil {
			t.Error(err)
		}
		n.delete("c1")
	})
}

func TestAFailedCreationLeavesNothing(t *testing.T) {
	eachStray(t, func(t *testing.T, n *node, rt *ctr.Runtime, s *specs.Spec, fault func(string)) {
		// Of the last the program has no record, and a hook of its goes on.
		for _, name := range []string{"create-killed", "create-pid", "create-forgotten"} {
			fault(name)
			_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "c1", Spec: s, Runtime: rt})
			if err == nil {
				t.Fatalf("%s: it has not failed", name)
			}
			left, _ := filepath.Glob(n.dir + "/keeper/*/*")
			if len(left) > 0 || running("sleep 4243") > 0 || strings.Contains(processes(), "crun") || exists("/sys/fs/cgroup/c1") {
				t.Errorf("%s: %v; left %v, and of processes\n%s", name, err, left, processes())
			}
		}
	})
}
