package ctr

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/opencontainers/cgroups/devices" // libcontainer refuses device rules without it
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // the C half of libcontainer's init
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr/wire"
	"github.com/coracle-cri/coracle/rootless/nstest"
)

// A spec is right when libcontainer and the kernel take it inside a user namespace. So these tests run what
// BuildSpec and PauseSpec make, through specconv and libcontainer as the keeper does.

func init() {
	// libcontainer moves a locked thread into the container's mount namespace; it must not be the main one.
	runtime.LockOSThread()
	if len(os.Args) > 1 && os.Args[1] == "init" { // libcontainer executes this binary as a container's init
		libcontainer.Init()
	}
}

func TestMain(m *testing.M) { nstest.Main(m) }

// kernelRequest is a request whose root filesystem shows the programs of this machine.
func kernelRequest(t *testing.T, script string, change ...func(*SpecRequest)) SpecRequest {
	t.Helper()
	host, err := GatherHost(HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rootfs := machineRootfs(t)
	ns := podNamespaces(t)
	req := request(func(r *SpecRequest) {
		r.Host, r.Rootfs, r.Users, r.Namespaces = host, rootfs, RootfsUsers(rootfs), ns
		r.Container.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
		r.Container.Command = []string{"/bin/sh", "-c", script}
	})
	for _, c := range change {
		c(&req)
	}
	return req
}

// machineRootfs makes a root filesystem with this machine's programs and an /etc of its own.
func machineRootfs(t *testing.T) string {
	t.Helper()
	root := realDir(t, "rootfs")
	for _, dir := range []string{"/usr", "/bin", "/sbin", "/lib", "/lib64"} {
		info, err := os.Lstat(dir)
		if err != nil {
			continue
		}
		at := filepath.Join(root, dir)
		if info.Mode()&os.ModeSymlink != 0 {
			target, err := os.Readlink(dir)
			must(t, err)
			must(t, os.Symlink(target, at))
			continue
		}
		must(t, os.Mkdir(at, 0o755))
		must(t, unix.Mount(dir, at, "", unix.MS_BIND|unix.MS_REC, ""))
		t.Cleanup(func() { must(t, unix.Unmount(at, unix.MNT_DETACH)) })
	}
	must(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
	for name, content := range map[string]string{"passwd": testPasswd, "group": testGroup} {
		must(t, os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644))
	}
	return root
}

// realDir is a directory without symbolic links in its path, which every user may enter.
func realDir(t *testing.T, name string) string {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	dir := filepath.Join(base, name)
	must(t, os.Mkdir(dir, 0o755))
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// podNamespaces makes network, IPC and UTS namespaces, held by a process that ends with the test.
func podNamespaces(t *testing.T) Namespaces {
	t.Helper()
	holder := exec.Command("sleep", "60")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	must(t, holder.Start())
	t.Cleanup(func() {
		must(t, holder.Process.Kill())
		_ = holder.Wait() // killed
	})
	path := func(kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", holder.Process.Pid, kind) }
	return Namespaces{Net: path("net"), IPC: path("ipc"), UTS: path("uts")}
}

// running is a container of libcontainer's.
type running struct {
	t         *testing.T
	container *libcontainer.Container
	process   *libcontainer.Process
	output    *bytes.Buffer
}

// start runs spec as the keeper does.
func start(t *testing.T, spec *specs.Spec) *running {
	t.Helper()
	id := fmt.Sprintf("t%d", time.Now().UnixNano())
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec, RootlessCgroups: true})
	must(t, err)
	c, err := libcontainer.Create(realDir(t, "state"), id, config)
	must(t, err)
	t.Cleanup(func() { must(t, c.Destroy()) })
	p := spec.Process
	r := &running{t: t, container: c, output: &bytes.Buffer{}}
	r.process = &libcontainer.Process{
		Init: true, Args: p.Args, Env: p.Env, Cwd: p.Cwd, UID: int(p.User.UID), GID: int(p.User.GID),
		NoNewPrivileges: &p.NoNewPrivileges, Stdout: r.output, Stderr: r.output, LogLevel: "2",
		Capabilities: &configs.Capabilities{
			Bounding: p.Capabilities.Bounding, Effective: p.Capabilities.Effective, Permitted: p.Capabilities.Permitted,
			Inheritable: p.Capabilities.Inheritable, Ambient: p.Capabilities.Ambient,
		},
	}
	for _, g := range p.User.AdditionalGids {
		r.process.AdditionalGroups = append(r.process.AdditionalGroups, int(g))
	}
	for _, l := range p.Rlimits {
		r.process.Rlimits = append(r.process.Rlimits, configs.Rlimit{Type: wire.Rlimits[l.Type], Hard: l.Hard, Soft: l.Soft})
	}
	if err := c.Run(r.process); err != nil {
		t.Fatalf("run %v: %v\n%s", p.Args, err, r.output)
	}
	return r
}

// wait returns what the process wrote, and its exit code.
func (r *running) wait() (string, int) {
	r.t.Helper()
	state, err := r.process.Wait()
	if state == nil {
		r.t.Fatalf("wait: %v", err)
	}
	return r.output.String(), state.ExitCode()
}

// runScript builds and runs a container of a shell script, which must succeed, and returns its lines "name=value".
func runScript(t *testing.T, script string, change ...func(*SpecRequest)) map[string]string {
	t.Helper()
	spec, _, err := BuildSpec(kernelRequest(t, "set -u\n"+script, change...))
	must(t, err)
	out, code := start(t, spec).wait()
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	lines := map[string]string{}
	for line := range strings.Lines(out) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			t.Fatalf("unexpected output %q in %q", line, out)
		}
		lines[key] = value
	}
	return lines
}

func expect(t *testing.T, got, want map[string]string) {
	t.Helper()
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: got %q, want %q", key, got[key], value)
		}
	}
}

// status prints fields of a container's own status.
const status = `field() { while read k v; do [ "$k" = "$1:" ] && echo "$1=$v"; done < /proc/self/status; }
can() { if "$@" 2>/dev/null >&2; then echo yes; else echo no; fi; }
flags() { while read a b c d where opts rest; do [ "$where" = "$1" ] && last=$opts; done < /proc/self/mountinfo; echo "$last"; }
`

func TestDefaultContainerRuns(t *testing.T) {
	got := runScript(t, status+`
		field CapBnd; field CapEff; field CapAmb; field NoNewPrivs
		echo "id=$(id -u):$(id -g) $(id -G)"
		echo "cwd=$PWD"; echo "host=$HOSTNAME"
		echo "null=$(can sh -c 'echo x >/dev/null')"; echo "zero=$(head -c 2 /dev/zero | wc -c)"; echo "urandom=$(head -c 2 /dev/urandom | wc -c)"
		echo "ptmx=$(can test -c /dev/ptmx)"; echo "shm=$(can touch /dev/shm/x)"; echo "mqueue=$(can touch /dev/mqueue/x)"
		echo "root=$(can touch /x)"
		echo "procsys=$(can sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward')"
		echo "timerlist=$(wc -c < /proc/timer_list)"
		echo "sys=$(flags /sys)"
		echo "net=$(ls /sys/class/net)"
		echo "pid=$$"
	`, func(r *SpecRequest) { r.Container.WorkingDir = "/made/for/it" })
	expect(t, got, map[string]string{
		"CapBnd": "00000000a80425fb", "CapEff": "00000000a80425fb", "CapAmb": "0000000000000000", "NoNewPrivs": "0",
		"id": "0:0 0", "cwd": "/made/for/it", "host": "web-0", "null": "yes", "zero": "2", "urandom": "2", "ptmx": "yes", "shm": "yes",
		"mqueue": "yes", "root": "yes", "procsys": "no", "timerlist": "0", "sys": "ro,nosuid,nodev,noexec,relatime", "net": "lo", "pid": "1",
	})
}

func TestUserCapabilitiesAndReadonlyRoot(t *testing.T) {
	if nstest.IDs() == 1 {
		t.Skip("this user has no subordinate ids: newuidmap or /etc/subuid is missing")
	}
	hard := Limit{}
	got := runScript(t, status+`
		field CapBnd; field CapEff; field CapAmb; field NoNewPrivs
		echo "id=$(id -u):$(id -g) $(id -G)"; echo "root=$(can touch /tmp/x)"; echo "nofile=$(ulimit -Hn)"; echo "home=$HOME"
		echo "oom=$(cat /proc/self/oom_score_adj)"
	`, func(r *SpecRequest) {
		hard = r.Host.Rlimits["RLIMIT_NOFILE"]
		r.Rlimits = map[string]Limit{"RLIMIT_NOFILE": {Soft: 100, Hard: unix.RLIM_INFINITY}}
		r.Container.Linux.Resources = &resources{OomScoreAdj: -999}
	}, security(func(s *securityContext) {
		s.RunAsUsername, s.SupplementalGroups, s.NoNewPrivs, s.ReadonlyRootfs = "app", []int64{1234}, true, true
		s.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}
	}))
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	must(t, err)
	expect(t, got, map[string]string{
		"CapBnd": "0000000000000400", "CapEff": "0000000000000400", "CapAmb": "0000000000000400", "NoNewPrivs": "1",
		"id": "1000:1001 1001 26 1234 50000", "root": "no", "nofile": fmt.Sprint(hard.Hard), "home": "/home/app", "oom": strings.TrimSpace(string(own)),
	})
}

func TestPrivilegedContainerRuns(t *testing.T) {
	got := runScript(t, status+`field CapEff
		echo "mount=$(can mount -t tmpfs tmpfs /mnt)"; echo "sys=$(flags /sys)"; echo "forward=$(can sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward')"
		echo "full=$(can test -c /dev/full)"`,
		func(r *SpecRequest) { must(t, os.Mkdir(filepath.Join(r.Rootfs, "mnt"), 0o755)) },
		security(func(s *securityContext) { s.Privileged = true }))
	expect(t, got, map[string]string{
		"CapEff": "000001ffffffffff", "mount": "yes", "sys": "rw,nosuid,nodev,noexec,relatime", "forward": "yes", "full": "yes",
	})
}

func TestNodeNamespaces(t *testing.T) {
	own, err := os.Readlink("/proc/self/ns/pid")
	must(t, err)
	got := runScript(t, `echo "pid=$(readlink /proc/self/ns/pid)"; echo "sys=$(ls -d /sys/class)"; echo "shm=$(ls -d /dev/shm)"`,
		func(r *SpecRequest) {
			r.Namespaces = Namespaces{HostNet: true, HostIPC: true, HostUTS: true, HostPID: true}
			r.Container.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
				Pid: runtimeapi.NamespaceMode_NODE, Network: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE,
			}
		})
	expect(t, got, map[string]string{"pid": own, "sys": "/sys/class", "shm": "/dev/shm"})
}

func TestMaskedAndReadonlyPathsInTheKernel(t *testing.T) {
	const script = status + `
		echo "masked=$(cat /etc/group | wc -c)"; echo "other=$(can grep -q root /etc/passwd)"
		echo "dir=$(can touch /opt/x)"; echo "beside=$(can touch /x)"; echo "forward=$(can sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward')"`
	opt := func(r *SpecRequest) { must(t, os.Mkdir(filepath.Join(r.Rootfs, "opt"), 0o755)) }
	got := runScript(t, script, opt, security(func(s *securityContext) {
		s.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		s.MaskedPaths, s.ReadonlyPaths = []string{"/etc/group", "/not/there"}, []string{"/opt"}
	}))
	// Lists that are given are whole: /proc/sys is not among them.
	expect(t, got, map[string]string{"masked": "0", "other": "yes", "dir": "no", "beside": "yes", "forward": "yes"})
}

// TestTargetInTheKernel: a container that joins another one's pid namespace sees its processes, and has a /proc of it.
func TestTargetInTheKernel(t *testing.T) {
	spec, _, err := BuildSpec(kernelRequest(t, "exec sleep 60"))
	must(t, err)
	target := start(t, spec)
	pid, err := target.process.Pid()
	must(t, err)
	got := runScript(t, `echo "first=$(tr '\0' ' ' </proc/1/cmdline)"; echo "own=$(test $$ -gt 1 && echo another)"`, func(r *SpecRequest) {
		r.Namespaces.PID = fmt.Sprintf("/proc/%d/ns/pid", pid)
		r.Container.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "t"}
	})
	expect(t, got, map[string]string{"first": "sleep 60", "own": "another"})
	must(t, target.container.Signal(unix.SIGKILL))
	if _, code := target.wait(); code != -1 { // as os.ProcessState has it
		t.Errorf("target: exit code %d", code)
	}
}
