package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
)

// crictlEnv is what the node told its user to export, and no configuration file of the machine's.
func (n *node) crictlEnv() []string {
	return []string{"CONTAINER_RUNTIME_ENDPOINT=" + n.endpoint, "CRI_CONFIG_FILE=" + n.crictlConfig()}
}

func (n *node) crictlConfig() string { return n.write("crictl.yaml", "timeout: 60\n") }

// try runs crictl, whatever comes of it.
func (n *node) try(args ...string) result {
	n.t.Helper()
	return n.command(n.crictlEnv(), crictlBin, args...)
}

// crictl runs crictl, which must succeed, and returns what it printed.
func (n *node) crictl(args ...string) string {
	n.t.Helper()
	r := n.try(args...)
	if r.code != 0 {
		n.t.Fatalf("crictl %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.errs)
	}
	return strings.TrimRight(r.out, "\n")
}

// crictlCommand prepares a crictl that goes on while the test does.
func (n *node) crictlCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(crictlBin, args...)
	cmd.Env, cmd.Dir = append(append([]string{}, n.env...), n.crictlEnv()...), n.path("work")
	return cmd
}

// object is a piece of JSON or of a configuration of the CRI, with its field names as crictl reads them.
type object map[string]any

// podConfig is a sandbox's configuration. Fields of extra replace or add to it.
func (n *node) podConfig(name string, extra object) string {
	config := object{"metadata": object{"name": name, "namespace": "e2e", "uid": "uid-" + name, "attempt": 0},
		"hostname": name, "log_directory": n.path("work", "logs-"+n.name+"-"+name), "labels": object{"app": name}, "linux": object{}}
	return n.config("pod-"+n.name+"-"+name+".json", config, extra)
}

// containerConfig is a container's configuration.
func (n *node) containerConfig(name, image string, extra object) string {
	config := object{"metadata": object{"name": name, "attempt": 0}, "image": object{"image": image}, "log_path": name + ".log", "linux": object{}}
	return n.config("container-"+n.name+"-"+name+".json", config, extra)
}

func (n *node) config(file string, config, extra object) string {
	n.t.Helper()
	for k, v := range extra {
		config[k] = v
	}
	raw, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		n.t.Fatal(err)
	}
	return n.write(file, string(raw))
}

// runPod runs a sandbox and returns its id and its configuration.
func (n *node) runPod(name string, extra object) (id, config string) {
	n.t.Helper()
	config = n.podConfig(name, extra)
	return n.crictl("runp", config), config
}

// start makes and starts a container in a pod and returns its id.
func (n *node) start(pod, podConfig, name, image string, extra object) string {
	n.t.Helper()
	id := n.crictl("create", pod, n.containerConfig(name, image, extra), podConfig)
	n.crictl("start", id)
	return id
}

// shell is a container that runs a script.
func shell(script string) object { return object{"command": []string{"/bin/sh", "-c", script}} }

// with adds to an object.
func (o object) with(key string, value any) object {
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	out[key] = value
	return out
}

// inspect returns the CRI's status of a container, pod or image by crictl's command for it.
func (n *node) inspect(command, id string) object {
	n.t.Helper()
	var answer struct {
		Status object `json:"status"`
		Info   object `json:"info"`
	}
	raw := n.crictl(command, "-o", "json", id)
	if err := json.Unmarshal([]byte(raw), &answer); err != nil {
		n.t.Fatalf("crictl %s: %v\n%s", command, err, raw)
	}
	if answer.Status == nil {
		n.t.Fatalf("crictl %s %s has no status:\n%s", command, id, raw)
	}
	return answer.Status
}

// field walks into an object: "a.b.c".
func (o object) field(path string) any {
	var at any = map[string]any(o)
	for _, key := range strings.Split(path, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[key]
	}
	return at
}

func (o object) text(path string) string {
	if v := o.field(path); v != nil {
		return fmt.Sprint(v)
	}
	return ""
}

// podIP is a pod's address.
func (n *node) podIP(id string) string {
	n.t.Helper()
	ip := n.inspect("inspectp", id).text("network.ip")
	if ip == "" {
		n.t.Fatalf("pod %s has no address", id)
	}
	return ip
}

// exec runs a command in a container over a stream and returns what it printed; it must succeed.
func (n *node) exec(id string, command ...string) string {
	n.t.Helper()
	return n.crictl(append([]string{"exec", id}, command...)...)
}
