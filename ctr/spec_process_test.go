package ctr

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestArgumentsFollowTheTableOfKubernetes(t *testing.T) {
	image := ImageConfig{Entrypoint: []string{"/ep-1"}, Cmd: []string{"foo", "bar"}}
	for _, c := range []struct {
		name                string
		command, args, want []string
		image               ImageConfig
	}{
		{"image alone", nil, nil, []string{"/ep-1", "foo", "bar"}, image},
		{"command alone", []string{"/c-1"}, nil, []string{"/c-1"}, image},
		{"args alone", nil, []string{"zoo", "boo"}, []string{"/ep-1", "zoo", "boo"}, image},
		{"both", []string{"/c-1"}, []string{"zoo"}, []string{"/c-1", "zoo"}, image},
		{"image without entrypoint", nil, nil, []string{"sh"}, ImageConfig{Cmd: []string{"sh"}}},
		{"args to an image without entrypoint", nil, []string{"ls"}, []string{"ls"}, ImageConfig{Cmd: []string{"sh"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, func(r *SpecRequest) {
				r.Container.Command, r.Container.Args, r.Image = c.command, c.args, c.image
			})
			equal(t, "args", spec.Process.Args, c.want)
		})
	}
	refused(t, ErrInvalid, []string{"command"}, func(r *SpecRequest) { r.Image = ImageConfig{} })
	refused(t, ErrInvalid, []string{"NUL"}, func(r *SpecRequest) { r.Container.Args = []string{"a\x00b"} })
}

func TestEnvironment(t *testing.T) {
	kv := func(k, v string) *runtimeapi.KeyValue { return &runtimeapi.KeyValue{Key: k, Value: []byte(v)} }
	for _, c := range []struct {
		name  string
		image []string
		envs  []*runtimeapi.KeyValue
		tty   bool
		want  []string
	}{
		{"defaults", nil, nil, false, []string{"PATH=" + defaultPath, "HOSTNAME=web-0"}},
		{"a terminal", nil, nil, true, []string{"PATH=" + defaultPath, "HOSTNAME=web-0", "TERM=xterm"}},
		{"image over defaults", []string{"PATH=/opt", "A=1"}, nil, false, []string{"PATH=/opt", "HOSTNAME=web-0", "A=1"}},
		{
			"container over image, last wins, empty counts", []string{"A=1", "B=x=y"},
			[]*runtimeapi.KeyValue{kv("A", "2"), kv("C", ""), kv("A", "3"), kv("HOSTNAME", "h")}, false,
			[]string{"PATH=" + defaultPath, "HOSTNAME=h", "A=3", "B=x=y", "C="},
		},
		{"a value is any text", nil, []*runtimeapi.KeyValue{kv("RAW", "é\n=\x01")}, false,
			[]string{"PATH=" + defaultPath, "HOSTNAME=web-0", "RAW=é\n=\x01"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, func(r *SpecRequest) { r.Image.Env, r.Container.Envs, r.Container.Tty = c.image, c.envs, c.tty })
			equal(t, "env", spec.Process.Env, c.want)
			if spec.Process.Terminal != c.tty {
				t.Errorf("terminal %v, want %v", spec.Process.Terminal, c.tty)
			}
		})
	}
	for _, bad := range []*runtimeapi.KeyValue{kv("", "x"), kv("A=B", "x"), kv("A", "a\x00b")} {
		refused(t, ErrInvalid, []string{"environment"}, func(r *SpecRequest) { r.Container.Envs = []*runtimeapi.KeyValue{bad} })
	}
	refused(t, ErrInvalid, []string{"of the image"}, func(r *SpecRequest) { r.Image.Env = []string{"NOVALUE"} })
}

// TestEnvironmentThatIsNotUTF8: what the spec says is what a reader of its JSON reads, and the loss is told.
func TestEnvironmentThatIsNotUTF8(t *testing.T) {
	raw := func(r *SpecRequest) {
		r.Container.Envs = []*runtimeapi.KeyValue{{Key: "RAW", Value: []byte("a\xff\xfeé\xc3")}}
	}
	spec, sentences := build(t, raw)
	want := "RAW=a\ufffd\ufffdé\ufffd"
	if !slices.Contains(spec.Process.Env, want) || len(sentences) != 1 || !strings.Contains(sentences[0], "RAW") {
		t.Errorf("env %q, sentences %q", spec.Process.Env, sentences)
	}
	written, err := json.Marshal("RAW=a\xff\xfeé\xc3")
	if err != nil {
		t.Fatal(err)
	}
	var read string
	if err := json.Unmarshal(written, &read); err != nil || read != want {
		t.Errorf("JSON makes %q of it, %v", read, err)
	}
	refused(t, ErrUnsupported, []string{"strict", "RAW"}, raw, func(r *SpecRequest) { r.Host.Strict = true })
}

func TestWorkingDirectory(t *testing.T) {
	for _, c := range []struct{ image, container, want string }{
		{"", "", "/"}, {"/srv", "", "/srv"}, {"/srv", "/new/dir", "/new/dir"}, {"srv/app", "", "/srv/app"}, {"/a/../b", "", "/b"},
	} {
		spec, _ := build(t, func(r *SpecRequest) { r.Image.WorkingDir, r.Container.WorkingDir = c.image, c.container })
		if spec.Process.Cwd != c.want {
			t.Errorf("image %q, container %q: cwd %q, want %q", c.image, c.container, spec.Process.Cwd, c.want)
		}
	}
	refused(t, ErrInvalid, []string{"working directory", "NUL"}, func(r *SpecRequest) { r.Container.WorkingDir = "/a\x00b" })
}

func TestRlimitsAreClampedToTheHardLimit(t *testing.T) {
	spec, sentences := build(t, func(r *SpecRequest) {
		r.Rlimits = map[string]Limit{"RLIMIT_NOFILE": {1 << 20, 1 << 20}, "RLIMIT_CORE": {0, 0}}
		r.Host.Rlimits = map[string]Limit{"RLIMIT_NOFILE": {1024, 20000}, "RLIMIT_CORE": {0, unix.RLIM_INFINITY}}
	})
	want := []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NOFILE", Soft: 20000, Hard: 20000}}
	if !slices.Equal(spec.Process.Rlimits, want) {
		t.Errorf("rlimits %v, want %v", spec.Process.Rlimits, want)
	}
	if len(sentences) != 1 || !strings.Contains(sentences[0], "RLIMIT_NOFILE") {
		t.Errorf("sentences %q, want one on RLIMIT_NOFILE", sentences)
	}
	refused(t, ErrInvalid, []string{"RLIMIT_X"}, func(r *SpecRequest) { r.Rlimits = map[string]Limit{"RLIMIT_X": {}} })
	refused(t, ErrInvalid, []string{"soft"}, func(r *SpecRequest) { r.Rlimits = map[string]Limit{"RLIMIT_CPU": {2, 1}} })
}

func TestAQuarterOfTheProcessesIsTheNodes(t *testing.T) {
	for own, want := range map[uint64][]specs.POSIXRlimit{
		4096:               {{Type: "RLIMIT_NPROC", Soft: 3072, Hard: 3072}},
		unix.RLIM_INFINITY: nil,
	} {
		spec, sentences := build(t, func(r *SpecRequest) { r.Host.Rlimits = map[string]Limit{"RLIMIT_NPROC": {own, unix.RLIM_INFINITY}} })
		if !slices.Equal(spec.Process.Rlimits, want) || len(sentences) > 0 {
			t.Errorf("of %d: rlimits %v, want %v; sentences %q", own, spec.Process.Rlimits, want, sentences)
		}
	}
}

func TestExecProcessIsTheContainersOwnAndShares(t *testing.T) {
	spec, _ := build(t, security(func(s *runtimeapi.LinuxContainerSecurityContext) {
		s.RunAsUser, s.NoNewPrivs = &runtimeapi.Int64Value{Value: 1000}, true
	}))
	p := ExecProcess(spec, []string{"id", "-G"}, true)
	equal(t, "args", p.Args, []string{"id", "-G"})
	if p.User.UID != 1000 || !slices.Equal(p.User.AdditionalGids, spec.Process.User.AdditionalGids) || !p.NoNewPrivileges || !p.Terminal {
		t.Errorf("process %+v is not the container's", p)
	}
	if !slices.Contains(p.Env, "TERM=xterm") || slices.Contains(spec.Process.Env, "TERM=xterm") {
		t.Errorf("env %q, of the container %q", p.Env, spec.Process.Env)
	}
	p.Env[0], p.Capabilities.Bounding[0], p.User.AdditionalGids[0] = "changed", "changed", 7
	if spec.Process.Env[0] == "changed" || spec.Process.Capabilities.Bounding[0] == "changed" || spec.Process.User.AdditionalGids[0] == 7 {
		t.Error("the exec's process shares memory with the container's spec")
	}
}

func TestStopSignal(t *testing.T) {
	for _, c := range []struct {
		container runtimeapi.Signal
		image     string
		want      syscall.Signal
	}{
		{0, "", unix.SIGTERM},
		{0, "SIGQUIT", unix.SIGQUIT},
		{0, "QUIT", unix.SIGQUIT},
		{0, "quit", unix.SIGQUIT},
		{0, "3", unix.SIGQUIT},
		{0, "SIGRTMIN", 34},
		{0, "SIGRTMIN+3", 37},
		{0, "RTMAX-1", 63},
		{0, " SIGINT ", unix.SIGINT},
		{runtimeapi.Signal_SIGNAL_SIGUSR1, "SIGQUIT", unix.SIGUSR1},
		{runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, "", 37},
		{runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS14, "", 50},
		{runtimeapi.Signal_SIGNAL_SIGRTMAX, "", 64},
		{runtimeapi.Signal_SIGNAL_SIGCLD, "", unix.SIGCHLD},
		{runtimeapi.Signal_SIGNAL_SIGIOT, "", unix.SIGABRT},
	} {
		if got, err := StopSignal(c.container, c.image); err != nil || got != c.want {
			t.Errorf("%v, %q: %v, %v; want %v", c.container, c.image, got, err, c.want)
		}
	}
	for number, name := range runtimeapi.Signal_name {
		if got, err := StopSignal(runtimeapi.Signal(number), ""); err != nil || got < 1 || got > 64 {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for _, bad := range []string{"SIGNOPE", "0", "65", "-1", "SIGRTMIN+31", "SIGRTMAX+1", "SIGRTMIN3"} {
		if got, err := StopSignal(0, bad); err == nil {
			t.Errorf("%q: %v, want an error", bad, got)
		}
	}
}
