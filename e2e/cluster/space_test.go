package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// patience is how long what takes a second on a quiet machine may take.
var patience = map[bool]time.Duration{false: 2 * time.Minute, true: 6 * time.Minute}[inVM]

// space is a namespace of the cluster, for one test.
type space struct {
	t    *testing.T
	name string
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// newSpace makes a namespace, which goes with the test.
func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{t: t, name: strings.Trim(notInNames.ReplaceAllString(strings.ToLower(t.Name()), "-"), "-")}
	kubectl(t, "create", "namespace", s.name)
	// The controller makes it a moment later, and pods are refused until then.
	s.eventually("the namespace has its service account", func() error {
		_, err := try("-n", s.name, "get", "serviceaccount", "default")
		return err
	})
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try("-n", s.name, "describe", "pods")
			t.Logf("pods of the test:\n%s", out)
		}
		kubectl(t, "delete", "namespace", s.name, "--wait=false")
	})
	return s
}

// command is kubectl with the administrator's kubeconfig.
func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "kubectl"), append([]string{"--kubeconfig", the.kubeconfig}, args...)...)
	cmd.Env = the.env
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// tryInput runs kubectl to its end and returns what it printed; an error holds what it said on standard error.
func tryInput(input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience+30*time.Second)
	defer cancel()
	cmd := command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

func try(args ...string) (string, error) { return tryInput("", args...) }

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := try(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *space) try(args ...string) (string, error) {
	return try(append([]string{"-n", s.name}, args...)...)
}

func (s *space) kubectl(args ...string) string {
	s.t.Helper()
	return kubectl(s.t, append([]string{"-n", s.name}, args...)...)
}

// apply makes objects. IMAGE stands for the small image.
func (s *space) apply(manifest string) {
	s.t.Helper()
	manifest = strings.NewReplacer("IMAGE", the.busybox, "HEALTH", the.health, "NAMESPACE", s.name).Replace(manifest)
	if _, err := tryInput(manifest, "-n", s.name, "apply", "-f", "-"); err != nil {
		s.t.Fatal(err)
	}
}

// get prints one field of an object.
func (s *space) get(object, jsonpath string) string {
	s.t.Helper()
	return s.kubectl("get", object, "-o", "jsonpath="+jsonpath)
}

// wait waits for a condition or a field: wait("pod/a", "condition=Ready").
func (s *space) wait(object, what string) {
	s.t.Helper()
	s.kubectl("wait", object, "--for="+what, "--timeout="+patience.String())
}

func (s *space) ready(pod string) {
	s.t.Helper()
	s.wait("pod/"+pod, "condition=Ready")
}

// succeeded waits for a pod that ends by itself, and returns its log.
func (s *space) succeeded(pod string) string {
	s.t.Helper()
	s.eventually("pod "+pod+" ends", func() error {
		switch phase := s.get("pod/"+pod, "{.status.phase}"); phase {
		case "Succeeded":
			return nil
		case "Failed":
			s.t.Fatalf("pod %s has failed; its log:\n%s", pod, s.kubectl("logs", pod, "--all-containers"))
			return nil
		default:
			return fmt.Errorf("phase %s", phase)
		}
	})
	return s.kubectl("logs", pod, "--all-containers")
}

// exec runs a shell's script in a pod.
func (s *space) exec(pod, script string) string {
	s.t.Helper()
	return s.kubectl("exec", pod, "--", "sh", "-c", script)
}

// eventually calls probe until it returns nil, and fails the test with its last error when patience has ended.
func (s *space) eventually(what string, probe func() error) {
	s.t.Helper()
	eventually(s.t, what, probe)
}

func eventually(t *testing.T, what string, probe func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := probe()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// want fails the test where the text does not hold each part.
func want(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("there is no %q in:\n%s", p, text)
		}
	}
}

// pod is a manifest of a pod of one container that runs a script; extra are further lines of its spec, two blanks deep.
func pod(name, script, extra string) string {
	raw, _ := json.Marshal([]string{"sh", "-c", script})
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %s}}
spec:
  terminationGracePeriodSeconds: 1
%s
  containers:
  - name: main
    image: IMAGE
    command: %s
`, name, name, extra, raw)
}
