package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// identities are the containers of a space's pods: name, id, restarts and start, as the API server has them.
func (s *space) identities() string {
	s.t.Helper()
	return s.kubectl("get", "pods", "--sort-by=.metadata.name", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {range .status.containerStatuses[*]}{.containerID} {.restartCount} {.state.running.startedAt}{"\n"}{end}{end}`)
}

// pid is the process of one of the cluster's programs, as the node numbers it.
func pid(t *testing.T, program string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(the.dir, "data", "coracle-"+node, "cluster", "run", program+".pid"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(raw))
}

// restarted ends a program of the cluster and waits for its successor.
func restarted(t *testing.T, program string) {
	t.Helper()
	before := pid(t, program)
	if err := the.script("cluster", "restart", "--name", name, program); err != nil {
		t.Fatal(err)
	}
	eventually(t, program+" runs again", func() error {
		if pid(t, program) == before {
			return errors.New("it has not started")
		}
		return nil
	})
}

// restartDaemon ends coracle's daemon by a signal; the keeper starts its successor.
func restartDaemon(t *testing.T, signal string) {
	t.Helper()
	daemon := func() (string, error) {
		out, err := the.coracle("enter", "--", "sh", "-c", `for f in /proc/[0-9]*/cmdline; do
			set -- $(tr '\0' ' ' <$f)
			case "$1 $2" in */coracle\ daemon) f=${f%/cmdline} && echo ${f#/proc/} ;; esac
		done 2>/dev/null`)
		if out = strings.TrimSpace(out); err == nil && out == "" {
			err = errors.New("there is no daemon")
		}
		return out, err
	}
	old, err := daemon()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := the.coracle("enter", "--", "sh", "-c", "kill "+signal+" "+old); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another daemon answers", func() error {
		now, err := daemon()
		if err == nil && now == old {
			err = fmt.Errorf("the daemon %s has not ended", old)
		}
		if err == nil {
			_, err = the.crictl("version")
		}
		return err
	})
}

// toldOfNode waits until the kubelet has told that its node is alive, after the given time.
func toldOfNode(t *testing.T, since time.Time) {
	t.Helper()
	eventually(t, "the kubelet has told of the node", func() error {
		var lease struct {
			Spec struct {
				RenewTime time.Time `json:"renewTime"`
			} `json:"spec"`
		}
		raw, err := try("-n", "kube-node-lease", "get", "lease", node, "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(raw), &lease)
		}
		if err == nil && lease.Spec.RenewTime.Before(since) {
			err = fmt.Errorf("the last word is of %s", lease.Spec.RenewTime)
		}
		return err
	})
}

// TestRestarts: whichever program ends and comes back, pods keep their containers, answer all the while, and are
// managed as before.
func TestRestarts(t *testing.T) {
	s := newSpace(t)
	s.apply(strings.Replace(web, "replicas: 3", "replicas: 8", 1))
	s.apply(pod("client", "sleep 100000", ""))
	s.kubectl("rollout", "status", "deployment/web", "--timeout="+patience.String())
	s.ready("client")
	nodePort := s.get("service/web", "{.spec.ports[0].nodePort}")
	s.answers(nodePort, "one", 8)
	asked := s.askAllTheWhile(nodePort)
	before := s.identities()
	if n := strings.Count(before, "coracle://"); n != 9 {
		t.Fatalf("containers:\n%s", before)
	}
	for _, what := range []string{"kubelet", "daemon", "kube-proxy", "kube-controller-manager", "kube-scheduler", "kube-apiserver", "etcd"} {
		t.Logf("%s: %s ends", time.Now().Format(time.TimeOnly), what)
		if what == "daemon" {
			restartDaemon(t, "-TERM")
			restartDaemon(t, "-KILL")
		} else {
			restarted(t, what)
		}
		s.eventually("the API server answers after the restart of "+what, func() error { _, err := s.try("get", "pods"); return err })
		toldOfNode(t, time.Now())
		// One more pod than before: the restarted program does its work.
		extra := "after-" + what
		s.apply(pod(extra, "sleep 1000", ""))
		s.ready(extra)
		// A new kube-proxy runs before it has written its rules, and a name is refused meanwhile.
		s.eventually("the service answers after the restart of "+what, func() error {
			got, err := s.try("exec", extra, "--", "sh", "-c", "wget -qO- http://web/")
			if err == nil && !strings.HasPrefix(got, "one from") {
				err = fmt.Errorf("it answers %q", got)
			}
			if err != nil {
				t.Logf("%s: %v", time.Now().Format(time.TimeOnly), err)
			}
			return err
		})
		s.kubectl("delete", "pod", extra, "--now")
		after := s.identities()
		for line := range strings.Lines(before) {
			if !slices.Contains(slices.Collect(strings.Lines(after)), line) {
				t.Errorf("after the restart of %s a container is not what it was: %safter:\n%s", what, line, after)
			}
		}
	}
	asked()
	s.answers(nodePort, "one", 8)
}

// askAllTheWhile asks a port of the host again and again, until the returned function is called: that fails the test
// where an answer was missed.
func (s *space) askAllTheWhile(port string) (stop func()) {
	var (
		end    = make(chan struct{})
		ended  = make(chan struct{})
		asked  int
		missed []error
	)
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			case <-time.After(50 * time.Millisecond):
			}
			asked++
			if _, err := fetch(port); err != nil {
				missed = append(missed, fmt.Errorf("%s: %w", time.Now().Format(time.TimeOnly), err))
			}
		}
	}()
	s.t.Cleanup(func() { // where the test fails before
		select {
		case <-end:
		default:
			close(end)
		}
		<-ended
	})
	return func() {
		s.t.Helper()
		close(end)
		<-ended
		if len(missed) > 0 {
			s.t.Errorf("%d of %d requests had no answer: %v", len(missed), asked, missed)
		}
	}
}

// TestEviction: the kubelet, told that it wants more room for images than there is, says so in the node's
// condition and takes it back when the setting is gone. What it goes by is the CRI's ImageFsInfo.
// No other test runs beside it: the kubelet would end its pods.
func TestEviction(t *testing.T) {
	setting := filepath.Join(the.dir, "data", "coracle-"+node, "kubelet", "conf.d", "90-eviction.conf")
	const text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nevictionHard: {imagefs.available: 1000Ti}\nevictionPressureTransitionPeriod: 1s\n"
	pressure := func(status string) {
		t.Helper()
		eventually(t, "the condition DiskPressure is "+status, func() error {
			got, err := try("get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="DiskPressure")].status}`)
			if err == nil && got != status {
				err = fmt.Errorf("it is %q", got)
			}
			return err
		})
	}
	if err := os.WriteFile(setting, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(setting) })
	restarted(t, "kubelet")
	pressure("True")
	if err := os.Remove(setting); err != nil {
		t.Fatal(err)
	}
	restarted(t, "kubelet")
	pressure("False")
}
