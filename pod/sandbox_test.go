package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	modePod       = runtimeapi.NamespaceMode_POD
	modeContainer = runtimeapi.NamespaceMode_CONTAINER
	modeNode      = runtimeapi.NamespaceMode_NODE
	modeTarget    = runtimeapi.NamespaceMode_TARGET
)

func TestValidatePod(t *testing.T) {
	type config = runtimeapi.PodSandboxConfig
	security := func(c *config) *runtimeapi.LinuxSandboxSecurityContext { return c.Linux.SecurityContext }
	idMapping := []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}
	userns := func(uids, gids []*runtimeapi.IDMapping) func(*config) {
		return func(c *config) {
			security(c).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modePod, Uids: uids, Gids: gids}
		}
	}
	for _, tc := range []struct {
		name   string
		change func(*config)
		want   codes.Code
		says   string
	}{
		{name: "as it is", change: func(*config) {}},
		{name: "no linux part", change: func(c *config) { c.Linux = nil }},
		{name: "no hostname", change: func(c *config) { c.Hostname = "" }},
		{name: "no metadata", change: func(c *config) { c.Metadata = nil }, want: codes.InvalidArgument},
		{name: "no uid", change: func(c *config) { c.Metadata.Uid = "" }, want: codes.InvalidArgument, says: "uid"},
		{name: "no name", change: func(c *config) { c.Metadata.Name = "" }, want: codes.InvalidArgument},
		{name: "no namespace", change: func(c *config) { c.Metadata.Namespace = "" }, want: codes.InvalidArgument},
		{name: "long hostname", change: func(c *config) { c.Hostname = strings.Repeat("x", 65) }, want: codes.InvalidArgument, says: "64"},
		{name: "longest hostname", change: func(c *config) { c.Hostname = strings.Repeat("x", 64) }},
		{name: "hostname with a line", change: func(c *config) { c.Hostname = "a\nb" }, want: codes.InvalidArgument},
		{name: "relative log directory", change: func(c *config) { c.LogDirectory = "logs" }, want: codes.InvalidArgument, says: "logs"},
		{name: "group without user", change: func(c *config) { security(c).RunAsGroup = &runtimeapi.Int64Value{Value: 1} }, want: codes.InvalidArgument, says: "run_as_group"},
		{name: "group with user", change: func(c *config) {
			security(c).RunAsGroup, security(c).RunAsUser = &runtimeapi.Int64Value{Value: 1}, &runtimeapi.Int64Value{Value: 1}
		}},
		{name: "network CONTAINER", change: func(c *config) { security(c).NamespaceOptions.Network = modeContainer }, want: codes.InvalidArgument, says: "network"},
		{name: "ipc TARGET", change: func(c *config) { security(c).NamespaceOptions.Ipc = modeTarget }, want: codes.InvalidArgument, says: "ipc"},
		{name: "pid TARGET", change: func(c *config) { security(c).NamespaceOptions.Pid = modeTarget }, want: codes.InvalidArgument, says: "pid"},
		{name: "userns NODE", change: func(c *config) {
			security(c).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modeNode}
		}},
		{name: "userns NODE with mappings", change: func(c *config) {
			security(c).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modeNode, Uids: []*runtimeapi.IDMapping{{Length: 1}}}
		}, want: codes.InvalidArgument},
		{name: "userns POD, a mapping each", change: userns(idMapping, idMapping), want: codes.Unimplemented, says: "hostUsers"},
		{name: "userns POD without mappings", change: userns(nil, nil), want: codes.Unimplemented, says: "hostUsers"},
		{name: "userns POD, two mappings", change: userns(append(idMapping, idMapping...), idMapping), want: codes.InvalidArgument, says: "2 mappings in uids"},
		{name: "userns POD, no gids", change: userns(idMapping, nil), want: codes.InvalidArgument, says: "0 mappings in gids"},
		{name: "userns POD, root not mapped", change: userns(idMapping, []*runtimeapi.IDMapping{{ContainerId: 1, HostId: 1, Length: 9}}),
			want: codes.InvalidArgument, says: "container id 1 in gids"},
		{name: "userns POD, empty mapping", change: userns([]*runtimeapi.IDMapping{{HostId: 1}}, idMapping), want: codes.InvalidArgument, says: "0 ids"},
		{name: "userns CONTAINER", change: func(c *config) {
			security(c).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modeContainer}
		}, want: codes.InvalidArgument},
		{name: "userns TARGET", change: func(c *config) {
			security(c).NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: modeTarget}
		}, want: codes.InvalidArgument},
		{name: "sysctl of the pod", change: func(c *config) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "1", "kernel.sem": "1", "kernel.msgmax": "1", "fs.mqueue.msg_max": "1", "net/ipv4/tcp_fin_timeout": "1"}
		}},
		{name: "sysctl of the machine", change: func(c *config) { c.Linux.Sysctls = map[string]string{"vm.swappiness": "1"} }, want: codes.InvalidArgument, says: "whole machine"},
		{name: "sysctl that looks alike", change: func(c *config) { c.Linux.Sysctls = map[string]string{"kernel.semaphores": "1"} }, want: codes.InvalidArgument},
		{name: "sysctl that climbs", change: func(c *config) { c.Linux.Sysctls = map[string]string{"net.../vm.swappiness": "1"} }, want: codes.InvalidArgument},
		{name: "net sysctl of a host network", change: func(c *config) {
			security(c).NamespaceOptions.Network = modeNode
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
		}, want: codes.InvalidArgument, says: "node"},
		{name: "ipc sysctl of a host ipc", change: func(c *config) {
			security(c).NamespaceOptions.Ipc = modeNode
			c.Linux.Sysctls = map[string]string{"kernel.shmmax": "1"}
		}, want: codes.InvalidArgument},
		{name: "cgroup parent", change: func(c *config) { c.Linux.CgroupParent = "/kubepods/burstable/poduid" }},
		{name: "cgroup parent that is a slice", change: func(c *config) { c.Linux.CgroupParent = "kubepods-burstable.slice" },
			want: codes.InvalidArgument, says: "cgroupDriver: cgroupfs"},
		{name: "cgroup parent that is a path of slices", change: func(c *config) { c.Linux.CgroupParent = "/kubepods.slice/kubepods-burstable.slice" },
			want: codes.InvalidArgument, says: "kubepods-burstable.slice"},
		{name: "port 70000", change: func(c *config) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 70000, ContainerPort: 80}} }, want: codes.InvalidArgument},
		{name: "no container port", change: func(c *config) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 80}} }, want: codes.InvalidArgument},
		{name: "no host port", change: func(c *config) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, Protocol: runtimeapi.Protocol_SCTP}}
		}},
		{name: "bad host ip", change: func(c *config) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 1, ContainerPort: 80, HostIp: "here"}}
		}, want: codes.InvalidArgument, says: "here"},
		{name: "sctp", change: func(c *config) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 1, ContainerPort: 80, Protocol: runtimeapi.Protocol_SCTP}}
		}, want: codes.Unimplemented, says: "SCTP"},
		{name: "odd protocol", change: func(c *config) {
			c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 1, ContainerPort: 80, Protocol: 7}}
		}, want: codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := (&harness{}).podConfig("p")
			c.LogDirectory = "/logs"
			tc.change(c)
			err := grpcError(validatePod(c))
			wantCode(t, err, tc.want)
			if err != nil && !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v does not say %q", err, tc.says)
			}
		})
	}
}

func TestLogPath(t *testing.T) {
	for _, tc := range []struct {
		dir, path, want string
		bad             bool
	}{
		{"/logs", "c/0.log", "/logs/c/0.log", false},
		{"/logs", "a/../b.log", "/logs/b.log", false},
		{"/logs", "", "", false},
		{"", "c/0.log", "", false},
		{"/logs", "../x", "", true},
		{"/logs", "a/../../x", "", true},
		{"/logs", "/etc/passwd", "", true},
		{"/logs", ".", "", true},
	} {
		got, err := logPath(&runtimeapi.PodSandboxConfig{LogDirectory: tc.dir}, &runtimeapi.ContainerConfig{LogPath: tc.path})
		if got != tc.want || (err != nil) != tc.bad {
			t.Errorf("logPath(%q, %q) = %q, %v", tc.dir, tc.path, got, err)
		}
	}
}

func TestSandboxLife(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("web")
	config.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"svc"}}
	config.PortMappings = []*runtimeapi.PortMapping{{HostPort: 8080, ContainerPort: 80}, {ContainerPort: 443}}
	id := h.run(config)
	if len(id) != 64 {
		t.Errorf("id %q", id)
	}
	st := h.sandbox(id[:10])
	if st.Id != id || st.State != runtimeapi.PodSandboxState_SANDBOX_READY || st.CreatedAt <= 0 || st.Network.Ip != "10.88.0.1" || len(st.Network.AdditionalIps) != 1 {
		t.Errorf("status %v", st)
	}
	if st.Annotations["note/web"] != " kept\nas is " || st.Labels["app"] != "web" {
		t.Errorf("annotations %q, labels %q", st.Annotations, st.Labels)
	}
	if ports := h.network.attached[id].Ports; len(ports) != 1 || ports[0].HostPort != 8080 || ports[0].Protocol != "tcp" {
		t.Errorf("ports %v", ports)
	}
	if _, err := h.tryRun(config); err == nil {
		t.Error("the same metadata twice")
	} else {
		wantCode(t, err, codes.AlreadyExists)
	}
	dir := h.store.podDir(id)
	for file, want := range map[string]string{
		"resolv.conf": "nameserver 10.96.0.10", "hostname": "web\n", "hosts": "10.88.0.1\tweb",
	} {
		raw, err := os.ReadFile(filepath.Join(dir, "etc", file))
		if err != nil || !strings.Contains(string(raw), want) {
			t.Errorf("%s: %q %v", file, raw, err)
		}
	}
	var shm unix.Statfs_t
	if err := unix.Statfs(filepath.Join(dir, "shm"), &shm); err != nil || shm.Type != unix.TMPFS_MAGIC || int64(shm.Blocks)*shm.Bsize != 64<<20 {
		t.Errorf("shm: %+v %v", shm, err)
	}
	for range 2 { // both are idempotent
		if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Fatal(err)
		}
		if st := h.sandbox(id); st.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("state %v", st.State)
		}
	}
	if len(h.network.attached) > 0 || pinned(filepath.Join(dir, "ns/net")) {
		t.Error("the network was not given back")
	}
	for range 2 {
		if _, err := h.RemovePodSandbox(h.ctx(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := h.PodSandboxStatus(h.ctx(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	wantCode(t, err, codes.NotFound)
	_, err = h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: "unknown"})
	wantCode(t, err, codes.OK)
	again := h.run(config) // the name is free again
	if again == id {
		t.Error("an id came twice")
	}
}

// TestSandboxUndo makes each step fail; the harness then finds nothing left.
func TestSandboxUndo(t *testing.T) {
	h := newHarness(t)
	boom := errors.New("boom")
	shared := h.podConfig("p")
	shared.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	for name, set := range map[string]func(error){
		"attach":       func(err error) { h.network.set("attach", err) },
		"resolv.conf":  func(err error) { h.network.set("resolv", err) },
		"cgroup":       func(err error) { h.cgroups.set("make", err) },
		"pause":        func(err error) { h.keeper.setFailure("create", err) },
		"pause starts": func(err error) { h.keeper.setFailure("start", err) },
	} {
		t.Run(name, func(t *testing.T) {
			set(boom)
			if _, err := h.tryRun(shared); err == nil || !strings.Contains(err.Error(), "boom") {
				t.Errorf("got %v", err)
			}
			set(nil)
			h.checkNothingLeft()
			if _, err := os.Stat(shared.LogDirectory); err == nil {
				t.Error("the log directory is left")
			}
		})
	}
	shared.Linux.Sysctls = map[string]string{"net.ipv4.no_such_thing": "1"}
	_, err := h.tryRun(shared)
	wantCode(t, err, codes.InvalidArgument)
	h.checkNothingLeft()
}

// TestCallerGone: who hung up never learns the id, so nothing may be left under it.
func TestCallerGone(t *testing.T) {
	h := newHarness(t)
	ctx, cancel := context.WithCancel(h.ctx())
	h.network.on("resolv", func() {
		for !h.network.has() { // so that this is the last that RunPodSandbox asks of anybody
			time.Sleep(time.Millisecond)
		}
		cancel()
	})
	_, err := h.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: h.podConfig("p")})
	wantCode(t, err, codes.Canceled)
	h.checkNothingLeft()
	h.network.on("resolv", nil)
	pod := h.run(h.podConfig("p"))
	ctx, cancel = context.WithCancel(h.ctx())
	h.images.on("mount", cancel)
	_, err = h.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: shell("c", "")})
	wantCode(t, err, codes.Canceled)
	if all := h.listContainers(nil); len(all) > 0 || len(h.images.mounted) > 0 {
		t.Errorf("left: %v %v", all, h.images.mounted)
	}
	h.images.on("mount", nil)
	h.create(pod, shell("c", ""))
}

// TestNamesHaveOwners: the undo of one call may come after another call has taken the name.
func TestNamesHaveOwners(t *testing.T) {
	x := newIndex()
	if err := x.reserve("name", "first"); err != nil {
		t.Fatal(err)
	}
	x.release("name", "first")
	if err := x.reserve("name", "second"); err != nil {
		t.Fatal(err)
	}
	x.release("name", "first")
	if err := x.reserve("name", "third"); !errors.Is(err, errExists) {
		t.Errorf("a name was given twice: %v", err)
	}
}

// TestPodFilesAreBounded: a container that writes to /etc/hosts without end must not fill the runtime directory.
func TestPodFilesAreBounded(t *testing.T) {
	h := newHarness(t)
	p, err := h.index.pod(h.run(h.podConfig("p")))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{p.files().Hosts, p.files().Hostname, p.files().ResolvConf} {
		var here, runtime unix.Stat_t
		if err := errors.Join(unix.Stat(path, &here), unix.Stat(h.cfg.RuntimeDir, &runtime)); err != nil {
			t.Fatal(err)
		}
		if here.Dev == runtime.Dev {
			t.Errorf("%s is on the filesystem of the runtime directory", path)
		}
	}
	if err := os.WriteFile(p.files().Hosts, make([]byte, 20<<20), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("20 MiB of hosts: %v", err)
	}
}

func TestStopPodRetries(t *testing.T) {
	h := newHarness(t)
	id := h.run(h.podConfig("p"))
	h.network.set("detach", errors.New("boom"))
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err == nil {
		t.Error("a tear-down that fails is no error")
	}
	if h.sandbox(id).State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("the pod is still ready")
	}
	h.network.set("detach", nil)
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil || len(h.network.attached) > 0 {
		t.Errorf("second try: %v, %v", err, h.network.attached)
	}
}

func TestHostNamespaces(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("host")
	config.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: modeNode, Ipc: modeNode, Pid: modeNode}
	config.Hostname = ""
	id := h.run(config)
	if len(h.network.attached) > 0 || h.sandbox(id).Network.Ip != "" {
		t.Error("a host-network pod has an address")
	}
	p, err := h.index.pod(id)
	if err != nil {
		t.Fatal(err)
	}
	if node, _ := os.Hostname(); p.spec.Hostname != node {
		t.Errorf("hostname %q", p.spec.Hostname)
	}
	ns := h.podNamespaces(p)
	if ns.Net != h.network.node || !ns.HostIPC || !ns.HostUTS || p.files().Shm != "/dev/shm" {
		t.Errorf("namespaces %+v", ns)
	}
	c := shell("c", "exit 0")
	c.Linux.SecurityContext.NamespaceOptions = config.Linux.SecurityContext.NamespaceOptions
	h.start(h.create(id, c))
	// One that says nothing has what the pod has.
	plain := shell("plain", "exit 0")
	plain.Linux = nil
	got, err := h.index.container(h.create(id, plain))
	if err != nil {
		t.Fatal(err)
	}
	if kinds := got.spec.OCI.Linux.Namespaces; slices.ContainsFunc(kinds, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace }) {
		t.Errorf("namespaces %v, want the node's pid namespace", kinds)
	}
}

// TestSandboxResources: the cgroup is below the kubelet's, the resources are kept for who asks. And an attempt is another pod.
func TestSandboxResources(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("p")
	config.Linux.CgroupParent = "/kubepods/burstable"
	config.Linux.Overhead, config.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 7}, &runtimeapi.LinuxContainerResources{CpuShares: 2048}
	for attempt := range uint32(2) {
		config.Metadata.Attempt = attempt
		id := h.run(proto.CloneOf(config))
		p, err := h.index.pod(id)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.status.snapshot().Cgroup; got != "/kubepods/burstable/pod"+id {
			t.Errorf("cgroup %s", got)
		}
		if linux := p.spec.Config.GetLinux(); linux.GetOverhead().GetCpuShares() != 7 || linux.GetResources().GetCpuShares() != 2048 {
			t.Errorf("recorded %v", linux)
		}
	}
}

// TestSandboxIsChecked: RunPodSandbox asks ctr what no sandbox can have.
func TestSandboxIsChecked(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("labelled")
	config.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "s0:c1,c2"}
	_, err := h.tryRun(config)
	wantCode(t, err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "selinux_options") {
		t.Errorf("%v does not say what is wrong", err)
	}
}

// TestSharedPID: the pause process holds the namespace, and the pod is not ready without it.
func TestSharedPID(t *testing.T) {
	h := newHarness(t)
	config := h.podConfig("shared")
	config.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	id := h.run(config)
	if !pinned(filepath.Join(h.store.podDir(id), "ns/pid")) {
		t.Error("the pid namespace is not pinned")
	}
	c := shell("c", "sleep 1000")
	c.Linux.SecurityContext.NamespaceOptions.Pid = modePod
	ctrID := h.create(id, c)
	h.start(ctrID)
	target := shell("debug", "exit 0")
	target.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: modeTarget, TargetId: ctrID}
	debug := h.create(id, target)
	if !pinned(filepath.Join(h.store.containerDir(debug), "pid")) {
		t.Error("the target's pid namespace is not pinned")
	}
	if err := h.keeper.Kill(h.ctx(), id, unix.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return h.sandbox(id).State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY })
	_, err := h.tryCreate(id, shell("late", "exit 0"))
	wantCode(t, err, codes.FailedPrecondition)
}

func TestListPods(t *testing.T) {
	h := newHarness(t)
	a, b := h.run(h.podConfig("a")), h.run(h.podConfig("b"))
	if _, err := h.StopPodSandbox(h.ctx(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: b}); err != nil {
		t.Fatal(err)
	}
	ready := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	for _, tc := range []struct {
		filter *runtimeapi.PodSandboxFilter
		want   []string
	}{
		{nil, []string{a, b}},
		{&runtimeapi.PodSandboxFilter{Id: a}, []string{a}},
		{&runtimeapi.PodSandboxFilter{Id: b[:12]}, []string{b}},
		{&runtimeapi.PodSandboxFilter{Id: "none"}, nil},
		{&runtimeapi.PodSandboxFilter{State: ready}, []string{a}},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "b"}}, []string{b}},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "b"}, State: ready}, nil},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"other": ""}}, nil},
	} {
		var got []string
		for _, p := range h.listPods(tc.filter) {
			got = append(got, p.Id)
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%v: got %v, want %v", tc.filter, got, tc.want)
		}
	}
}
