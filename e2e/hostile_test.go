package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostileBin is the program of e2e/hostile.
var hostileBin = os.Getenv("CORACLE_E2E_HOSTILE")

// quarter is a kind of pod in which the hostile program is let loose.
type quarter struct {
	name      string
	pod       object   // security context of the pod and of its container
	container object   // of the container alone
	through   []string // attempts that get through, whatever the host
	host      []string // attempts that may, where the host has what they are about
}

func namespaces(kind string) object {
	return object{"namespace_options": object{kind: 2, "pid": pidMode(kind)}}
}

// pidMode: a container has a pid namespace of its own unless the node's is what the test is about.
func pidMode(kind string) int { return map[bool]int{true: 2, false: 1}[kind == "pid"] }

// TestHostilePods: from inside, every way out is tried; what gets through is, kind by kind, what is written here and
// nothing else.
func TestHostilePods(t *testing.T) {
	if hostileBin == "" {
		t.Fatal("CORACLE_E2E_HOSTILE does not name the program of e2e/hostile; to run these tests: make e2e")
	}
	x := newTarget(t)
	for _, q := range quarters() {
		t.Run(q.name, func(t *testing.T) {
			x.t = t
			x.check(q)
		})
	}
	x.t = t
	x.down("--grace", "0s")
}

// target is a node, and things on the host that nobody inside is to find.
type target struct {
	*node
	image string
	env   map[string]string
}

func newTarget(t *testing.T) *target {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	name := "coracle-e2e-" + strconv.Itoa(os.Getpid())
	abstract, err := net.Listen("unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abstract.Close() })
	streams := freePort(t)
	n, image := upWithBusybox(t, "default", "--streaming-address=127.0.0.1:"+streams)
	x := &target{node: n, image: image, env: map[string]string{"HOSTILE_ABSTRACT": name, "HOSTILE_STREAM_PORT": streams,
		"HOSTILE_HOST_PORT": strconv.Itoa(listener.Addr().(*net.TCPAddr).Port), "HOSTILE_STATE": filepath.Join(n.dir, "run", "coracle")}}
	x.plantKey(t, name)
	x.plantMemory(t)
	return x
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// plantKey puts a key into the keyring of the host's user.
func (x *target) plantKey(t *testing.T, name string) {
	t.Helper()
	id, err := unix.AddKey("user", name, []byte("secret"), unix.KEY_SPEC_USER_KEYRING)
	if err != nil {
		t.Logf("no key is planted: %v", err) // a sandbox may forbid keyrings
		return
	}
	t.Cleanup(func() { _, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0) })
	x.env["HOSTILE_KEY"] = name
}

// plantMemory makes a segment of shared memory on the host, known by its odd size.
func (x *target) plantMemory(t *testing.T) {
	t.Helper()
	size := 4096 + os.Getpid()%4096
	id, err := unix.SysvShmGet(unix.IPC_PRIVATE, size, unix.IPC_CREAT|0o666)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil) })
	x.env["HOSTILE_SHM"] = fmt.Sprint(id, " ", size)
}

// check runs the program as a container's, and again by exec, which must find the same.
func (x *target) check(q quarter) {
	x.t.Helper()
	name := strings.NewReplacer(" ", "-", ",", "", "+", "").Replace(strings.ToLower(q.name))
	pod, file := x.runPod(name, object{"linux": object{"security_context": q.pod}})
	id := x.start(pod, file, name, x.image, x.hostile(q, "/hostile; exec sleep 1000"))
	x.awaitLog(id, "end")
	x.compare(q, "as a container", x.crictl("logs", id))
	x.compare(q, "by exec", x.exec(id, "/hostile"))
	x.crictl("rmp", "-f", pod)
}

// hostile is a container with the program in it.
func (x *target) hostile(q quarter, script string) object {
	context := object{}
	for _, from := range []object{q.pod, q.container} {
		for key, value := range from {
			context[key] = value
		}
	}
	if context["namespace_options"] == nil {
		context["namespace_options"] = object{"pid": 1}
	}
	var env []object
	for key, value := range x.env {
		env = append(env, object{"key": key, "value": value})
	}
	return shell(script).with("envs", env).with("linux", object{"security_context": context}).
		with("mounts", []object{{"host_path": hostileBin, "container_path": "/hostile", "readonly": true}})
}

func (x *target) compare(q quarter, how, out string) {
	x.t.Helper()
	found := map[string]string{}
	kept := 0
	for line := range strings.Lines(out) {
		f := strings.SplitN(strings.TrimRight(line, "\n"), "\t", 3)
		if len(f) == 3 && f[1] == "through" {
			found[f[0]] = f[2]
		} else if len(f) == 3 {
			kept++
		}
	}
	if kept < 50 || !strings.Contains(out, "\nend") {
		x.t.Errorf("%s: the program has not made all of its attempts:\n%s", how, out)
	}
	for name, detail := range found {
		if !slices.Contains(q.through, name) && !slices.Contains(q.host, name) {
			x.t.Errorf("%s, what is to be kept gets through: %s (%s)", how, name, detail)
		}
	}
	for _, name := range q.through {
		if _, ok := found[name]; !ok {
			x.t.Errorf("%s, what the CRI grants is kept: %s", how, name)
		}
	}
	if x.t.Failed() {
		raw, _ := json.Marshal(found)
		x.t.Logf("%s: %s", how, raw)
	}
}
