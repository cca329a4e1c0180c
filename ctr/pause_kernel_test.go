package ctr

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// startPause starts the PID 1 of a pod as the keeper does.
func startPause(t *testing.T) (*running, Namespaces) {
	t.Helper()
	host, err := GatherHost(HostOptions{})
	must(t, err)
	dir := realDir(t, "pause")
	must(t, EnsurePause(dir))
	ns := podNamespaces(t)
	spec, err := PauseSpec(PauseRequest{Rootfs: dir, Namespaces: ns, Host: host})
	must(t, err)
	r := start(t, spec)
	pid, err := r.process.Pid()
	must(t, err)
	awaitPause(t, pid)
	ns.PID = fmt.Sprintf("/proc/%d/ns/pid", pid)
	return r, ns
}

// awaitPause waits until pause ignores SIGCHLD, the second thing that it does. What is sent earlier is lost, as with
// any PID 1.
func awaitPause(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		must(t, err)
		// Bit 16 is SIGCHLD, which pause ignores last. Others may be inherited: make leaves 32 and 33 ignored.
		if ignored, ok := maskIn(string(raw), "SigIgn:"); ok && ignored&(1<<16) != 0 {
			return
		}
	}
	t.Fatal("pause is not ready after 5 s")
}

// maskIn reads a signal mask of /proc/PID/status.
func maskIn(status, field string) (uint64, bool) {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, field); ok {
			mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return mask, err == nil
		}
	}
	return 0, false
}

func TestPauseEndsOnTermAndInt(t *testing.T) {
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		r, _ := startPause(t)
		for _, ignored := range []unix.Signal{unix.SIGHUP, unix.SIGUSR1, unix.SIGCHLD, unix.SIGWINCH} {
			must(t, r.container.Signal(ignored))
		}
		must(t, r.container.Signal(sig))
		if out, code := r.wait(); code != 0 || out != "" {
			t.Errorf("%v: exit code %d, output %q; want 0 and nothing", sig, code, out)
		}
	}
}

func TestPauseReapsAndShowsNothingOfTheNode(t *testing.T) {
	pause, ns := startPause(t)
	shared := func(r *SpecRequest) {
		r.Namespaces = ns
		r.Container.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	}
	const script = status + `
		(sleep 0.1 &) # an orphan that ends later
		(sh -c 'true & exec sleep 0.1' &) # an orphan that brings a zombie along
		sleep 0.4
		echo "pid=$(can test $$ -gt 1)"
		echo "left=$(cat /proc/[0-9]*/stat | grep -c -e ') Z ' -e '(sleep)')"
		echo "root=$(echo $(ls /proc/1/root/ 2>/dev/null))"
		echo "program=$(readlink /proc/1/exe 2>/dev/null)"
		echo "forward=$(can sh -c 'echo 1 >/proc/1/root/proc/sys/net/ipv4/ip_forward')"
		echo "kcore=$(can sh -c 'head -c 1 /proc/1/root/proc/kcore | grep -q .')"
	`
	all := map[string]string{"pid": "yes", "left": "0", "root": "dev pause proc", "program": "/pause", "forward": "no", "kcore": "no"}
	expect(t, runScript(t, script, shared, security(func(s *securityContext) { s.Privileged = true })), all)
	if nstest.IDs() > 1 {
		// Another uid, and no CAP_SYS_PTRACE: even that much is hidden.
		all["root"], all["program"] = "", ""
	}
	expect(t, runScript(t, script, shared), all)
	must(t, pause.container.Signal(unix.SIGTERM))
	if _, code := pause.wait(); code != 0 {
		t.Errorf("pause: exit code %d, want 0", code)
	}
}
