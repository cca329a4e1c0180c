package e2e

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestRestartsUnderLoad swaps the keeper and the daemon again and again while pods are made, run to their ends, executed in
// and removed. Calls may fail while a daemon is exchanged; nothing else may: no exit code is wrong, no line is lost or
// doubled, nothing is left, and the keeper holds no more descriptors in the end. It takes some ten seconds:
//
//	CORACLE_E2E_FAULTS=1 make e2e RUN=TestRestartsUnderLoad
func TestRestartsUnderLoad(t *testing.T) {
	if os.Getenv("CORACLE_E2E_FAULTS") == "" {
		t.Skip("it takes long; to run it: CORACLE_E2E_FAULTS=1 make e2e RUN=TestRestartsUnderLoad")
	}
	u := newUpgrade(t)
	u.letEnd()
	descriptors := func() int { return len(glob(t, "/proc", fmt.Sprintf("%d/fd/*", u.process("coracle-keeper")))) }
	if r := u.restart(binDir, "--keeper"); r.code != 0 {
		t.Fatal(r.errs)
	}
	u.oneLife("before", 1) // libcontainer keeps some open from a keeper's first start on
	before := descriptors()
	const swaps = 60
	var done sync.WaitGroup
	stop := make(chan struct{})
	for worker := range 3 {
		done.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-stop:
					return
				default:
					u.oneLife(fmt.Sprintf("w%d-%d", worker, round), 1+(worker+round)%100)
				}
			}
		})
	}
	began := time.Now()
	for i := range swaps {
		dir, args := nextDir, []string{}
		if i%4 < 2 {
			dir = binDir
		}
		if i%2 == 0 {
			args = []string{"--keeper"}
		}
		if r := u.restart(dir, args...); r.code != 0 {
			t.Errorf("swap %d: exit code %d: %s%s", i, r.code, r.out, r.errs)
		}
	}
	close(stop)
	done.Wait()
	t.Logf("%d swaps in %s", swaps, time.Since(began).Round(time.Millisecond))
	u.unharmed()
	for _, id := range strings.Fields(u.crictl("pods", "-q")) {
		if id != u.pod {
			u.crictl("rmp", "--force", id)
		}
	}
	eventually(t, 10*time.Second, "the keeper has as many descriptors as before", func() error {
		if now := descriptors(); now > before+2 { // a call in progress has one or two
			return fmt.Errorf("%d, had %d", now, before)
		}
		return nil
	})
	u.leave()
}

// oneLife runs a pod with a container to its end. A call that fails is made again, as a kubelet does: the daemon may be on
// its way out or in.
func (u *upgrade) oneLife(name string, code int) {
	again := func(args ...string) string {
		var r result
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if r = u.try(args...); r.code == 0 {
				return strings.TrimSpace(r.out)
			}
		}
		u.t.Errorf("crictl %v: %s", args, r.errs)
		return ""
	}
	podFile := u.podConfig(name, nil)
	pod := again("runp", podFile)
	id := again("create", pod, u.containerConfig(name, u.image, shell(fmt.Sprintf("echo begin; usleep 30000; echo end; exit %d", code))), podFile)
	if pod == "" || id == "" {
		return
	}
	if r := u.try("start", id); r.code != 0 && !strings.Contains(r.errs, "not created") {
		// It may have been started all the same: what counts is what has become of it.
		u.t.Logf("start: %s", r.errs)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(30 * time.Millisecond) {
		out := again("inspect", id)
		if strings.Contains(out, `"CONTAINER_CREATED"`) {
			_ = u.try("start", id)
		}
		if !strings.Contains(out, `"CONTAINER_EXITED"`) {
			continue
		}
		if !strings.Contains(out, fmt.Sprintf(`"exitCode": %d,`, code)) && !strings.Contains(out, "StartError") {
			u.t.Errorf("%s ended otherwise than with %d: %s", name, code, out)
		}
		if log := again("logs", id); !strings.Contains(out, "StartError") && log != "begin\nend" {
			u.t.Errorf("the log of %s: %q", name, log)
		}
		again("rmp", "--force", pod)
		return
	}
	u.t.Errorf("%s does not end", name)
}
