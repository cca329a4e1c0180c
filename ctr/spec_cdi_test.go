package ctr

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	cdispecs "tags.cncf.io/container-device-interface/specs-go"
)

// cdiFiles writes specifications into directories of their own, the first of which ranks lowest.
func cdiFiles(t *testing.T, files ...string) []string {
	t.Helper()
	var dirs []string
	for _, content := range files {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "spec.yaml"), []byte(content), 0o600))
		dirs = append(dirs, dir)
	}
	return dirs
}

const gpuSpec = `cdiVersion: "0.7.0"
kind: vendor.com/gpu
devices:
- name: "0"
  containerEdits: {env: [GPU=0], deviceNodes: [{path: /dev/gpu0}]}
- name: all
  containerEdits: {env: [GPU=all], deviceNodes: [{path: /dev/gpu0}, {path: /dev/gpu1}]}
containerEdits: {env: [VENDOR=yes], additionalGids: [7]}
`

func TestCDISpecificationsAreReadAtUse(t *testing.T) {
	dirs := cdiFiles(t, gpuSpec)
	var node nodeFS
	edits, err := node.CDIEdits(dirs, []string{"vendor.com/gpu=all", "vendor.com/gpu=0"})
	must(t, err)
	equal(t, "env", edits.Env, []string{"VENDOR=yes", "GPU=all", "GPU=0"})
	if len(edits.DeviceNodes) != 3 || !slices.Equal(edits.AdditionalGIDs, []uint32{7}) {
		t.Errorf("edits %+v", edits)
	}
	// A later directory outranks an earlier one, and JSON is as good as YAML.
	dirs = append(dirs, t.TempDir(), "/no/such/directory")
	must(t, os.WriteFile(filepath.Join(dirs[1], "spec.json"), []byte(`{"cdiVersion":"0.6.0","kind":"vendor.com/gpu",
		"devices":[{"name":"0","containerEdits":{"env":["GPU=other"]}}]}`), 0o600))
	edits, err = node.CDIEdits(dirs, []string{"vendor.com/gpu=0"})
	must(t, err)
	equal(t, "env", edits.Env, []string{"GPU=other"})
	must(t, os.Remove(filepath.Join(dirs[1], "spec.json")))
	edits, err = node.CDIEdits(dirs, []string{"vendor.com/gpu=0"})
	must(t, err)
	equal(t, "env once that is gone", edits.Env, []string{"VENDOR=yes", "GPU=0"})
}

func TestUnknownCDIDevice(t *testing.T) {
	dirs := cdiFiles(t, gpuSpec, "cdiVersion: 0.7.0\nkind: broken\n", strings.ReplaceAll(gpuSpec, "vendor.com", "twice.com"))
	must(t, os.WriteFile(filepath.Join(dirs[2], "again.yaml"), []byte(strings.ReplaceAll(gpuSpec, "vendor.com", "twice.com")), 0o600))
	file := filepath.Join(dirs[0], "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for _, c := range []struct {
		dirs  []string
		name  string
		words []string
	}{
		{dirs, "vendor.com/gpu=9", append([]string{"vendor.com/gpu=9", dirs[1] + "/spec.yaml"}, dirs...)},
		{dirs, "twice.com/gpu=0", []string{"conflicting", "again.yaml"}},
		{[]string{file, dirs[0]}, "vendor.com/gpu=9", []string{file, "not a directory"}},
		{[]string{"/no/such/directory"}, "vendor.com/gpu=0", []string{"/no/such/directory"}},
		{nil, "vendor.com/gpu=0", []string{"cdiSpecDirs", "vendor.com/gpu=0"}},
		{dirs, "gpu0", []string{`"gpu0"`, "VENDOR/CLASS=DEVICE"}},
		{dirs, "", []string{`""`}},
	} {
		_, err := nodeFS{}.CDIEdits(c.dirs, []string{c.name})
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s in %v: %v, want ErrInvalid", c.name, c.dirs, err)
			continue
		}
		for _, w := range c.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q does not speak of %q", err, w)
			}
		}
	}
	// A directory that cannot be read hides none behind it.
	if _, err := (nodeFS{}).CDIEdits([]string{file, dirs[0]}, []string{"vendor.com/gpu=0"}); err != nil {
		t.Error(err)
	}
}

// withCDI gives the container the device d with these edits.
func withCDI(edits *cdispecs.ContainerEdits) func(*SpecRequest) {
	return func(r *SpecRequest) {
		fs := mountFS()
		fs.devs = map[string]bool{"/dev/gpu0": true, "/dev/real": true, "/dev/null": true}
		fs.files["/usr/bin/hook"] = nil
		fs.cdi = map[string]*cdispecs.ContainerEdits{"v.com/c=d": edits}
		r.Host.FS = fs
		r.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v.com/c=d"}, {Name: "v.com/c=d"}}
	}
}

func TestCDIEdits(t *testing.T) {
	spec, sentences := build(t, withCDI(&cdispecs.ContainerEdits{
		Env:            []string{"A=1", "PATH=/gpu/bin", "EMPTY="},
		AdditionalGIDs: []uint32{0, 44, 26},
		DeviceNodes:    []*cdispecs.DeviceNode{{Path: "/dev/gpu0"}, {Path: "/dev/alias", HostPath: "/dev/real", Type: "u", Major: 1, Permissions: "rw"}},
		Mounts: []*cdispecs.Mount{
			{HostPath: "/vol/locked", ContainerPath: "/usr/lib/gpu", Options: []string{"ro", "nosuid", "nodev", "bind", "rprivate"}},
			{HostPath: "/vol/link", ContainerPath: "/vol", Type: "bind"},
			{HostPath: "/vol/dir", ContainerPath: "/shared", Options: []string{"rbind", "rshared", "rw", "exec"}},
			{HostPath: "tmpfs", ContainerPath: "/scratch", Type: "tmpfs", Options: []string{"nosuid", "size=1m"}},
		},
	}), func(r *SpecRequest) {
		r.Container.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("0")}}
		r.Container.Mounts = []*runtimeapi.Mount{{HostPath: "/vol/file", ContainerPath: "/vol"}}
	}, security(func(s *securityContext) { s.RunAsUser = id(1000) }))
	equal(t, "env", spec.Process.Env, []string{"PATH=/gpu/bin", "HOSTNAME=web-0", "A=1", "EMPTY="})
	if want := []uint32{26, 44, 1001, 50000}; !slices.Equal(spec.Process.User.AdditionalGids, want) {
		t.Errorf("groups %v, want %v", spec.Process.User.AdditionalGids, want)
	}
	for _, want := range []specs.Mount{
		{Destination: "/dev/gpu0", Type: "bind", Source: "/dev/gpu0", Options: []string{"bind", "rprivate"}},
		{Destination: "/dev/alias", Type: "bind", Source: "/dev/real", Options: []string{"bind", "rprivate"}},
		{Destination: "/usr/lib/gpu", Type: "bind", Source: "/vol/locked", Options: []string{"rbind", "ro", "nosuid", "nodev", "noexec", "relatime", "rprivate"}},
		{Destination: "/vol", Type: "bind", Source: "/vol/dir", Options: []string{"rbind", "rprivate"}},
		{Destination: "/shared", Type: "bind", Source: "/vol/dir", Options: []string{"rbind", "rshared"}},
		{Destination: "/scratch", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "size=1m"}},
	} {
		at := slices.DeleteFunc(slices.Clone(spec.Mounts), func(m specs.Mount) bool { return m.Destination != want.Destination })
		if len(at) != 1 || !reflect.DeepEqual(at[0], want) {
			t.Errorf("%s: %+v, want %+v alone", want.Destination, at, want)
		}
	}
	if len(sentences) != 0 || len(spec.Linux.Devices) != 0 || spec.Linux.RootfsPropagation != "rshared" || spec.Hooks != nil {
		t.Errorf("sentences %q, linux %+v, hooks %+v", sentences, spec.Linux, spec.Hooks)
	}
}

func TestCDIHooks(t *testing.T) {
	hook := func(name string, timeout *int) *cdispecs.Hook {
		return &cdispecs.Hook{HookName: name, Path: "/usr/bin/hook", Args: []string{"hook", name}, Timeout: timeout}
	}
	edits := &cdispecs.ContainerEdits{Hooks: []*cdispecs.Hook{
		hook("createContainer", nil), hook("prestart", ptr(5)), hook("createContainer", ptr(4)),
		{HookName: "startContainer", Path: "/in/the/container", Env: []string{"A=b"}},
	}}
	spec, sentences := build(t, withCDI(edits))
	made := func(name string, timeout int) specs.Hook {
		return specs.Hook{Path: "/usr/bin/hook", Args: []string{"hook", name}, Env: []string{"PATH=" + defaultPath}, Timeout: &timeout}
	}
	want := &specs.Hooks{
		Prestart:        []specs.Hook{made("prestart", 5)},
		CreateContainer: []specs.Hook{made("createContainer", 30), made("createContainer", 4)},
		StartContainer:  []specs.Hook{{Path: "/in/the/container", Env: []string{"A=b"}, Timeout: ptr(30)}},
	}
	if !reflect.DeepEqual(spec.Hooks, want) || len(sentences) != 0 {
		t.Errorf("hooks %+v, want %+v; sentences %q", spec.Hooks, want, sentences)
	}
	// Of what is more than all may take, each gets its share.
	for _, c := range []struct{ asked, want []int }{
		{[]int{4000}, []int{60}}, {[]int{60, 30}, []int{60, 30}}, {[]int{4000, 4000}, []int{45, 45}}, {[]int{60, 60, 1}, []int{44, 44, 1}},
		{slices.Repeat([]int{60}, 90), slices.Repeat([]int{1}, 90)},
	} {
		var hooks []*cdispecs.Hook
		for _, seconds := range c.asked {
			hooks = append(hooks, hook("createRuntime", &seconds))
		}
		spec, _ := build(t, withCDI(&cdispecs.ContainerEdits{Hooks: hooks}))
		var got []int
		for _, h := range spec.Hooks.CreateRuntime {
			got = append(got, *h.Timeout)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("of %d seconds: %d, want %d", c.asked, got, c.want)
		}
	}
	refused(t, ErrInvalid, []string{"91 hooks"}, withCDI(&cdispecs.ContainerEdits{Hooks: slices.Repeat([]*cdispecs.Hook{hook("createRuntime", nil)}, 91)}))
	for _, c := range []struct {
		class error
		word  string
		hook  *cdispecs.Hook
	}{
		{ErrUnsupported, "poststop", hook("poststop", nil)},
		{ErrUnsupported, "poststart", hook("poststart", nil)},
		{ErrInvalid, "timeout 0", hook("prestart", ptr(0))},
		{ErrInvalid, "absolute", &cdispecs.Hook{HookName: "createContainer", Path: "hook"}},
		{ErrInvalid, "/no/hook", &cdispecs.Hook{HookName: "createContainer", Path: "/no/hook"}},
	} {
		refused(t, c.class, []string{c.word, "v.com/c=d"}, withCDI(&cdispecs.ContainerEdits{Hooks: []*cdispecs.Hook{c.hook}}))
	}
}

func TestCDIEditsRefused(t *testing.T) {
	mode := os.FileMode(0o600)
	node := func(d cdispecs.DeviceNode) *cdispecs.ContainerEdits {
		return &cdispecs.ContainerEdits{DeviceNodes: []*cdispecs.DeviceNode{&d}}
	}
	mount := func(m cdispecs.Mount) *cdispecs.ContainerEdits {
		return &cdispecs.ContainerEdits{Mounts: []*cdispecs.Mount{&m}}
	}
	for _, c := range []struct {
		class error
		word  string
		edits *cdispecs.ContainerEdits
	}{
		{ErrInvalid, "/dev/gone does not exist", node(cdispecs.DeviceNode{Path: "/dev/gone", Type: "c", Major: 195})},
		{ErrInvalid, `of type "c"`, node(cdispecs.DeviceNode{Path: "/dev/gpu0", Type: "b"})},
		{ErrInvalid, "/vol/none does not exist", mount(cdispecs.Mount{HostPath: "/vol/none", ContainerPath: "/x"})},
		{ErrInvalid, `"idmap"`, mount(cdispecs.Mount{HostPath: "/vol/dir", ContainerPath: "/x", Options: []string{"idmap"}})},
		{ErrInvalid, "containerPath", mount(cdispecs.Mount{Type: "tmpfs", ContainerPath: "/"})},
		{ErrUnsupported, "type ext4", mount(cdispecs.Mount{HostPath: "/dev/sda", ContainerPath: "/x", Type: "ext4"})},
		{ErrUnsupported, "not on a shared mount", mount(cdispecs.Mount{HostPath: "/vol/file", ContainerPath: "/x", Options: []string{"rshared"}})},
		{ErrUnsupported, "eth7", &cdispecs.ContainerEdits{NetDevices: []*cdispecs.LinuxNetDevice{{HostInterfaceName: "eth7", Name: "net1"}}}},
		{ErrUnsupported, "resctrl", &cdispecs.ContainerEdits{IntelRdt: &cdispecs.IntelRdt{ClosID: "x"}}},
		{ErrUnsupported, "gid 99999", &cdispecs.ContainerEdits{AdditionalGIDs: []uint32{99999}}},
		{ErrInvalid, "NAME=VALUE", &cdispecs.ContainerEdits{Env: []string{"A=\x00"}}},
	} {
		refused(t, c.class, []string{c.word, "CDI device v.com/c=d"}, withCDI(c.edits))
	}
	// What a bound node cannot be given is told, or refused where the policy says so.
	for _, d := range []cdispecs.DeviceNode{
		{Path: "/dev/gpu0", UID: ptr(uint32(5))}, {Path: "/dev/gpu0", FileMode: &mode}, {Path: "/dev/gpu0", Permissions: "none"},
		{Path: "/dev/gpu0", Permissions: "r"},
	} {
		if spec, sentences := build(t, withCDI(node(d))); len(sentences) != 1 || mountAt(spec, "/dev/gpu0") == nil {
			t.Errorf("%+v: sentences %q", d, sentences)
		}
		refused(t, ErrUnsupported, []string{"strict", "/dev/gpu0"}, withCDI(node(d)), func(r *SpecRequest) { r.Host.Strict = true })
	}
	refused(t, ErrInvalid, []string{"v.com/c=other"}, func(r *SpecRequest) {
		r.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "v.com/c=other"}}
	})
	// The annotations of the days before the field are not read (CRI: they "SHOULD NOT influence runtime behaviour").
	if spec, _ := build(t, func(r *SpecRequest) { r.Container.Annotations = map[string]string{"cdi.k8s.io/x": "v.com/c=d"} }); mountAt(spec, "/dev/gpu0") != nil {
		t.Error("an annotation brought a device")
	}
}
