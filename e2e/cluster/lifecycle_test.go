package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestProbes: each kind of handler, as a readiness, a liveness and a startup probe.
func TestProbes(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	// Ready by each kind of handler; the startup probe holds the others back.
	s.apply(pod("http", "exec httpd -f -p 8080 -h /www", "") + "    readinessProbe: {httpGet: {path: /index.html, port: 8080}, periodSeconds: 1}\n")
	s.apply(pod("tcp", "exec httpd -f -p 8080 -h /www", "") + "    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}\n")
	s.apply(pod("exec", "sleep 2; touch /tmp/ok; sleep 1000", "") + "    readinessProbe: {exec: {command: [cat, /tmp/ok]}, periodSeconds: 1}\n")
	s.apply(`
apiVersion: v1
kind: Pod
metadata: {name: grpc}
spec:
  containers:
  - name: main
    image: HEALTH
    startupProbe: {grpc: {port: 9090, service: late}, periodSeconds: 1, failureThreshold: 60}
    livenessProbe: {grpc: {port: 9090}, periodSeconds: 1}
    readinessProbe: {grpc: {port: 9090, service: late}, periodSeconds: 1}
`)
	// A liveness probe that fails after a while restarts the container, by each kind of handler; a startup probe that
	// gives up does, too.
	s.apply(pod("dies-exec", "touch /tmp/ok; sleep 3; rm /tmp/ok; sleep 1000", "") + "    livenessProbe: {exec: {command: [cat, /tmp/ok]}, periodSeconds: 1, failureThreshold: 2}\n")
	s.apply(pod("dies-http", "timeout 4 httpd -f -p 8080 -h /www; sleep 1000", "") + "    livenessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, failureThreshold: 2, initialDelaySeconds: 1}\n")
	s.apply(pod("dies-tcp", "timeout 4 httpd -f -p 8080 -h /www; sleep 1000", "") + "    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 2, initialDelaySeconds: 1}\n")
	s.apply(`
apiVersion: v1
kind: Pod
metadata: {name: dies-grpc}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: HEALTH, livenessProbe: {grpc: {port: 9090, service: early}, periodSeconds: 1, failureThreshold: 2, initialDelaySeconds: 1}}
`)
	s.apply(pod("never-starts", "sleep 1000", "") + "    startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, failureThreshold: 2}\n")
	for _, ready := range []string{"http", "tcp", "exec", "grpc"} {
		s.ready(ready)
	}
	for _, restarted := range []string{"dies-exec", "dies-http", "dies-tcp", "dies-grpc", "never-starts"} {
		s.eventually(restarted+" is restarted", func() error {
			if got := s.restarts(restarted); got == 0 {
				return errors.New("it was not")
			}
			return nil
		})
	}
	for _, left := range []string{"http", "tcp", "exec", "grpc"} {
		if got := s.restarts(left); got != 0 {
			t.Errorf("the pod %s was restarted %d times", left, got)
		}
	}
}

func (s *space) restarts(pod string) int {
	s.t.Helper()
	n, _ := strconv.Atoi(s.get("pod/"+pod, "{.status.containerStatuses[0].restartCount}"))
	return n
}

// TestInitAndSidecar: init containers run one after another, a sidecar from its turn on until after the others.
func TestInitAndSidecar(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(`
apiVersion: v1
kind: Pod
metadata: {name: ordered}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  volumes: [{name: shared, emptyDir: {}}]
  initContainers:
  - {name: first, image: IMAGE, command: [sh, -c, 'sleep 1; echo first >>/shared/order'], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: sidecar
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, 'echo sidecar >>/shared/order; trap "echo sidecar ends; exit 0" TERM; while :; do sleep 0.1; done']
    startupProbe: {exec: {command: [grep, sidecar, /shared/order]}, periodSeconds: 1}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - {name: second, image: IMAGE, command: [sh, -c, 'echo second >>/shared/order'], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, 'echo main >>/shared/order; cat /shared/order'], volumeMounts: [{name: shared, mountPath: /shared}]}
`)
	log := s.succeeded("ordered")
	want(t, log, "first\nsidecar\nsecond\nmain\n", "sidecar ends")
}

// TestTermination: hooks run, a pod that ends at SIGTERM ends at once, and one that does not is killed in the end.
func TestTermination(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	dir := t.TempDir()
	grace := func(manifest, seconds string) string {
		return strings.Replace(manifest, "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: "+seconds, 1)
	}
	s.apply(grace(pod("hooked", "trap 'echo terminated >/shared/term; exit 0' TERM; while :; do sleep 0.1; done",
		"  volumes: [{name: shared, hostPath: {path: "+dir+"}}]"), "300") + `
    lifecycle:
      postStart: {exec: {command: [sh, -c, 'echo started >/shared/post']}}
      preStop: {exec: {command: [sh, -c, 'test ! -e /shared/term && echo stopping >/shared/pre']}}
    volumeMounts: [{name: shared, mountPath: /shared}]
`)
	s.ready("hooked")
	s.kubectl("delete", "pod", "hooked", "--timeout="+patience.String()) // less than its grace period
	for _, file := range []string{"post", "pre", "term"} {
		if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
			t.Errorf("the hook or the signal has left no trace: %v", err)
		}
	}
	s.apply(grace(pod("deaf", "trap '' TERM; while :; do sleep 1; done", ""), "3"))
	s.ready("deaf")
	began := time.Now()
	s.kubectl("delete", "pod", "deaf")
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("a pod with a grace period of 3 s was killed after %s", took)
	}
}

func TestRestartPolicy(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.apply(pod("never", "exit 1", "  restartPolicy: Never"))
	s.apply(pod("on-failure", "test -e /shared/again || { touch /shared/again; exit 1; }", "  restartPolicy: OnFailure\n  volumes: [{name: shared, emptyDir: {}}]") +
		"    volumeMounts: [{name: shared, mountPath: /shared}]\n")
	s.apply(pod("always", "exit 0", ""))
	s.wait("pod/never", "jsonpath={.status.phase}=Failed")
	s.succeeded("on-failure")
	if got := s.restarts("on-failure"); got != 1 {
		t.Errorf("the pod that fails once was restarted %d times", got)
	}
	if got := s.restarts("never"); got != 0 {
		t.Errorf("the pod that is never restarted was, %d times", got)
	}
	s.eventually("what ends well is restarted, too", func() error {
		if got := s.restarts("always"); got == 0 {
			return fmt.Errorf("restarts: %d", got)
		}
		return nil
	})
}
