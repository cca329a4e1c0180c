package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// commands is every sub-command of crictl, with the test that calls it.
var commands = map[string]string{
	"attach": "TestCrictlWalk", "create": "TestCrictlWalk", "exec": "TestCrictlWalk", "images": "TestCrictlWalk", "info": "TestCrictlWalk",
	"inspect": "TestCrictlWalk", "inspecti": "TestCrictlWalk", "inspectp": "TestCrictlWalk", "logs": "TestCrictlWalk", "pods": "TestCrictlWalk",
	"port-forward": "TestCrictlWalk", "ps": "TestCrictlWalk", "pull": "TestCrictlWalk", "rm": "TestCrictlWalk", "rmi": "TestCrictlWalk",
	"rmp": "TestCrictlWalk", "runp": "TestCrictlWalk", "start": "TestCrictlWalk", "stop": "TestCrictlWalk", "stopp": "TestCrictlWalk",
	"version": "TestCrictlWalk", "stats": "TestStats", "statsp": "TestStats", "metricsp": "TestStats", "metricdescs": "TestStats",
	"checkpoint": "TestCrictlCommands", "events": "TestCrictlCommands", "imagefsinfo": "TestCrictlCommands", "run": "TestCrictlCommands",
	"runtime-config": "TestCrictlCommands", "update": "TestCrictlCommands", "update-runtime-config": "TestCrictlCommands",
	// These ask no runtime.
	"completion": "", "config": "", "help": "",
}

// TestCrictlCommands calls what the walk does not, and holds the list above against crictl's own.
func TestCrictlCommands(t *testing.T) {
	registry := newRegistry(t, fixture.RegistryOptions{User: "ann", Password: "secret"})
	image := pushBusybox(t, registry)
	n := newHome(t).up("default")
	n.everyCommandIsTested()
	n.pullWithCredentials(image)
	events := n.events()

	pod := n.podConfig("p", nil)
	id := n.crictl("run", "--no-pull", n.containerConfig("c", image, shell("sleep 1000")), pod)
	podID := n.crictl("pods", "-q", "--name", "p")

	if out := n.crictl("runtime-config"); !strings.Contains(out, "CGROUPFS") {
		t.Errorf("crictl runtime-config: %s", out)
	}
	n.imageFilesystem()
	n.updates(id)

	r := n.try("checkpoint", "--export="+n.path("work", "c.tar"), id)
	if r.code == 0 || !strings.Contains(r.errs, "Unimplemented") || !strings.Contains(r.errs, "CRIU") {
		t.Errorf("crictl checkpoint: exit code %d: %s%s", r.code, r.out, r.errs)
	}
	n.crictl("rmp", "-f", podID)
	events.want("CONTAINER_CREATED_EVENT "+podID, "CONTAINER_STARTED_EVENT "+podID, "CONTAINER_CREATED_EVENT "+id, "CONTAINER_STARTED_EVENT "+id,
		"CONTAINER_STOPPED_EVENT "+id, "CONTAINER_STOPPED_EVENT "+podID, "CONTAINER_DELETED_EVENT "+id, "CONTAINER_DELETED_EVENT "+podID)
	events.end()
	n.down()
}

// everyCommandIsTested reads the list of sub-commands that crictl's help has.
func (n *node) everyCommandIsTested() {
	n.t.Helper()
	_, list, found := strings.Cut(n.crictl("--help"), "COMMANDS:\n")
	list, _, found2 := strings.Cut(list, "\n\n")
	if !found || !found2 {
		n.t.Fatal("crictl --help lists no commands")
	}
	names := regexp.MustCompile(`(?m)^   ([a-z-]+)`).FindAllStringSubmatch(list, -1)
	if len(names) < 30 {
		n.t.Errorf("crictl --help lists %d commands", len(names))
	}
	for _, name := range names {
		if _, known := commands[name[1]]; !known {
			n.t.Errorf("crictl %s is called by no test", name[1])
		}
	}
}

func (n *node) pullWithCredentials(image string) {
	n.t.Helper()
	for _, args := range [][]string{{}, {"--creds", "ann:wrong"}, {"--auth", base64.StdEncoding.EncodeToString([]byte("eve:secret"))}} {
		r := n.try(slices.Concat([]string{"pull"}, args, []string{image})...)
		if r.code == 0 || !strings.Contains(r.errs, "Unauthorized") && !strings.Contains(r.errs, "PermissionDenied") && !strings.Contains(r.errs, "Unauthenticated") {
			n.t.Errorf("crictl pull %v: exit code %d: %s", args, r.code, r.errs)
		}
	}
	for _, args := range [][]string{{"--creds", "ann:secret"}, {"--auth", base64.StdEncoding.EncodeToString([]byte("ann:secret"))}} {
		n.crictl(slices.Concat([]string{"pull"}, args, []string{image})...)
		if len(args) > 0 && args[0] == "--creds" {
			n.crictl("rmi", image)
		}
	}
}

func (n *node) imageFilesystem() {
	n.t.Helper()
	var answer struct {
		Status struct {
			ImageFilesystems, ContainerFilesystems []struct {
				FsID      struct{ Mountpoint string } `json:"fsId"`
				UsedBytes struct{ Value string }
			}
		}
	}
	raw := n.crictl("imagefsinfo", "-o", "json")
	if err := json.Unmarshal([]byte(raw), &answer); err != nil {
		n.t.Fatalf("%v: %s", err, raw)
	}
	st := answer.Status
	if len(st.ImageFilesystems) != 1 || len(st.ContainerFilesystems) != 1 || st.ImageFilesystems[0].UsedBytes.Value == "" ||
		st.ImageFilesystems[0].UsedBytes.Value == "0" || !strings.HasPrefix(st.ImageFilesystems[0].FsID.Mountpoint, n.dataDir()) {
		n.t.Errorf("crictl imagefsinfo: %s", raw)
	}
}

// updates: what the host can enforce is in force afterwards, and what it cannot is told.
func (n *node) updates(id string) {
	n.t.Helper()
	if out := n.crictl("update", "--cpu-share=2048", "--memory=134217728", id); !strings.Contains(out, id) {
		n.t.Errorf("crictl update: %q", out)
	}
	status := n.inspect("inspect", id)
	for controller, want := range map[string]struct{ field, value, told string }{
		"cpu":    {"resources.linux.cpuShares", "2048", "cpu shares 2048"},
		"memory": {"resources.linux.memoryLimitInBytes", "134217728", "memory limit 134217728"},
	} {
		got, told := status.text(want.field), strings.Contains(status.text("message"), want.told)
		if has := n.hasController(controller); has && got != want.value || has == told {
			n.t.Errorf("controller %s is there: %v; %s is %q, message %q", controller, has, want.field, got, status.text("message"))
		}
	}
	if r := n.try("update", "--cpu-share=-5", id); r.code == 0 || !strings.Contains(r.errs, "InvalidArgument") {
		n.t.Errorf("crictl update by -5 shares: %d %s", r.code, r.errs)
	}
	n.crictl("update-runtime-config", "--pod-cidr", "10.99.0.0/24")
	pod, _ := n.runPod("moved", nil)
	if ip := n.podIP(pod); !strings.HasPrefix(ip, "10.99.0.") {
		n.t.Errorf("a pod made after crictl update-runtime-config has %s", ip)
	}
	n.crictl("rmp", "-f", pod)
	if r := n.try("update-runtime-config", "--pod-cidr", "nonsense"); r.code == 0 || !strings.Contains(r.errs, "InvalidArgument") {
		n.t.Errorf("crictl update-runtime-config nonsense: %d %s", r.code, r.errs)
	}
}

// eventStream is a crictl events that runs.
type eventStream struct {
	n    *node
	cmd  *exec.Cmd
	told chan object
	seen []string
}

func (n *node) events() *eventStream {
	n.t.Helper()
	e := &eventStream{n: n, cmd: n.crictlCommand("events"), told: make(chan object, 100)}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() { // ends with crictl
		defer close(e.told)
		for d := json.NewDecoder(out); ; {
			var event object
			if d.Decode(&event) != nil {
				return
			}
			e.told <- event
		}
	}()
	return e
}

// want waits until all of the events have come, in this order; others may be between them.
func (e *eventStream) want(events ...string) {
	e.n.t.Helper()
	deadline := time.After(20 * time.Second)
	for len(events) > 0 {
		select {
		case event, ok := <-e.told:
			if !ok {
				e.n.t.Fatal("crictl events has ended, or prints no JSON")
			}
			got := fmt.Sprintf("%s %s", event.text("containerEventType"), event.text("containerId"))
			e.seen = append(e.seen, got)
			if got == events[0] {
				events = events[1:]
			}
		case <-deadline:
			e.n.t.Fatalf("no event %q; there were:\n%s", events[0], strings.Join(e.seen, "\n"))
		}
	}
}

func (e *eventStream) end() {
	e.n.t.Helper()
	if err := e.cmd.Process.Kill(); err != nil {
		e.n.t.Error(err)
	}
	_ = e.cmd.Wait() // killed
	for range e.told {
	}
}
