package ctr

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// defaultPath is what a container without a PATH gets, as in every engine of this field.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// process sets what runs: arguments, working directory, terminal, environment.
func (b *builder) process() error {
	c, img, p := b.req.Container, b.req.Image, b.spec.Process
	if p.Args = arguments(c.GetCommand(), c.GetArgs(), img); len(p.Args) == 0 {
		return invalid("command: neither the container nor its image names one")
	}
	for _, a := range p.Args {
		if strings.ContainsRune(a, 0) {
			return invalid("command: argument %q contains a NUL byte", a)
		}
	}
	p.Terminal = c.GetTty()
	// libcontainer makes the directory where it is missing.
	p.Cwd = "/"
	for _, dir := range []string{img.WorkingDir, c.GetWorkingDir()} {
		if strings.ContainsRune(dir, 0) {
			return invalid("working directory %q contains a NUL byte", dir)
		}
		if dir != "" {
			p.Cwd = filepath.Join("/", dir)
		}
	}
	return b.environment()
}

// environment is the container's over the image's over what every container has.
func (b *builder) environment() error {
	c, img, p := b.req.Container, b.req.Image, b.spec.Process
	env := newEnvironment()
	env.set("PATH", defaultPath)
	if host := b.req.Pod.GetHostname(); host != "" {
		env.set("HOSTNAME", host)
	}
	if p.Terminal {
		env.set("TERM", "xterm")
	}
	for _, kv := range img.Env {
		key, value, found := strings.Cut(kv, "=")
		if !found || key == "" || strings.ContainsRune(kv, 0) {
			return invalid("environment of the image: %q is not NAME=VALUE", kv)
		}
		env.set(key, value)
	}
	for _, kv := range c.GetEnvs() {
		if kv.GetKey() == "" || strings.ContainsAny(kv.GetKey(), "=\x00") {
			return invalid("environment: %q is not a variable's name", kv.GetKey())
		}
		value, err := b.environmentValue(kv)
		if err != nil {
			return err
		}
		env.set(kv.GetKey(), value)
	}
	p.Env = env.list()
	return nil
}

// environmentValue: the CRI's values are bytes, an OCI spec is JSON, and so is what libcontainer sends to a container's
// init. Bytes that are no UTF-8 cannot get through; each becomes U+FFFD, which is what a spec written and read again says.
func (b *builder) environmentValue(kv *runtimeapi.KeyValue) (string, error) {
	value := string(kv.GetValue())
	if strings.ContainsRune(value, 0) {
		return "", invalid("environment: the value of %s contains a NUL byte", kv.GetKey())
	}
	if utf8.ValidString(value) {
		return value, nil
	}
	return string([]rune(value)), b.lack("environment: the value of %s is not UTF-8, and a container's configuration can carry nothing else: "+
		"each such byte is U+FFFD; mount the value as a file", kv.GetKey())
}

// arguments is the table of Kubernetes: a command replaces the image's Entrypoint and its Cmd, args alone replace
// only its Cmd.
func arguments(command, args []string, img ImageConfig) []string {
	if len(command) > 0 {
		return slices.Concat(command, args)
	}
	if len(args) > 0 {
		return slices.Concat(img.Entrypoint, args)
	}
	return slices.Concat(img.Entrypoint, img.Cmd)
}

// environment keeps variables in the order in which they first came, with the value that came last.
type environment struct {
	order  []string
	values map[string]string
}

func newEnvironment() *environment { return &environment{values: map[string]string{}} }

func (e *environment) set(key, value string) {
	if _, known := e.values[key]; !known {
		e.order = append(e.order, key)
	}
	e.values[key] = value
}

func (e *environment) list() []string {
	out := make([]string, 0, len(e.order))
	for _, key := range e.order {
		out = append(out, key+"="+e.values[key])
	}
	return out
}

// rlimits sets the node's limits, clamped: prlimit(2) above the hard limit is EPERM in a user namespace, and the
// container would not start.
func (b *builder) rlimits() error {
	for _, name := range slices.Sorted(maps.Keys(b.req.Rlimits)) {
		if _, known := wire.Rlimits[name]; !known {
			return invalid("rlimit %s does not exist", name)
		}
		want := b.req.Rlimits[name]
		if want.Soft > want.Hard {
			return invalid("rlimit %s: soft %d is above hard %d", name, want.Soft, want.Hard)
		}
		got := want
		if own, known := b.req.Host.Rlimits[name]; known {
			got = Limit{Soft: min(want.Soft, own.Hard), Hard: min(want.Hard, own.Hard)}
		}
		if got != want {
			b.note("%s %d:%d is lowered to %d:%d, the hard limit of the user that runs the node",
				name, want.Soft, want.Hard, got.Soft, got.Hard)
		}
		b.spec.Process.Rlimits = append(b.spec.Process.Rlimits, specs.POSIXRlimit{Type: name, Soft: got.Soft, Hard: got.Hard})
	}
	b.reserveProcesses()
	return nil
}

// reserveProcesses leaves a quarter of the processes that the node may have to its own programs: a container that forks
// without end, and that no pids controller stops, would else keep the keeper from making a thread, which ends a Go
// program. The kernel counts by user id, in the node's user namespace and then for the user as a whole (setrlimit(2),
// user_namespaces(7)), so this holds for one id at a time: it is no substitute for pids.max.
func (b *builder) reserveProcesses() {
	const name = "RLIMIT_NPROC"
	own, known := b.req.Host.Rlimits[name]
	if _, asked := b.req.Rlimits[name]; asked || !known || own.Soft == unix.RLIM_INFINITY {
		return
	}
	most := own.Soft - own.Soft/4
	b.spec.Process.Rlimits = append(b.spec.Process.Rlimits, specs.POSIXRlimit{Type: name, Soft: most, Hard: most})
}

// ExecProcess returns the process of an exec in the container of spec: the same user, groups, environment,
// directory, capabilities and no_new_privs. The seccomp filter is the container's, and libcontainer's affair.
func ExecProcess(spec *specs.Spec, cmd []string, tty bool) *specs.Process {
	p := *spec.Process
	p.Args, p.Terminal, p.ConsoleSize = slices.Clone(cmd), tty, nil
	p.Env = slices.Clone(p.Env)
	p.Rlimits = slices.Clone(p.Rlimits)
	p.User.AdditionalGids = slices.Clone(p.User.AdditionalGids)
	if c := p.Capabilities; c != nil {
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding: slices.Clone(c.Bounding), Effective: slices.Clone(c.Effective), Permitted: slices.Clone(c.Permitted),
			Inheritable: slices.Clone(c.Inheritable), Ambient: slices.Clone(c.Ambient),
		}
	}
	hasTerm := slices.ContainsFunc(p.Env, func(kv string) bool { return strings.HasPrefix(kv, "TERM=") })
	if tty && !hasTerm {
		p.Env = append(p.Env, "TERM=xterm")
	}
	return &p
}
