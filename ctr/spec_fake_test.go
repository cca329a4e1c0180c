package ctr

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	cdispecs "tags.cncf.io/container-device-interface/specs-go"
)

// fakeFS is a node's filesystem in memory.
type fakeFS struct {
	files       map[string][]byte // regular files
	dirs        map[string]bool
	devs        map[string]bool
	links       map[string]string
	flags       map[string][]string // by path; "relatime" otherwise
	propagation map[string]Propagation
	cdi         map[string]*cdispecs.ContainerEdits // by device
}

func (f *fakeFS) Lookup(p string) (Source, error) {
	p = path.Clean(p)
	if to, ok := f.links[p]; ok {
		p = to
	}
	src := Source{Path: p, Flags: []string{"relatime"}}
	if flags, ok := f.flags[p]; ok {
		src.Flags = flags
	}
	_, file := f.files[p]
	switch {
	case file:
		src.Mode = 0o644
	case f.dirs[p] || p == testRootfs:
		src.Mode = fs.ModeDir | 0o755
	case f.devs[p]:
		src.Mode = fs.ModeDevice | fs.ModeCharDevice | 0o666
	default:
		return Source{}, &fs.PathError{Op: "lstat", Path: p, Err: fs.ErrNotExist}
	}
	return src, nil
}

func (f *fakeFS) Propagation(p string) (Propagation, error) { return f.propagation[p], nil }

func (f *fakeFS) Devices(dir string) ([]string, error) {
	var out []string
	for d := range f.devs {
		if strings.HasPrefix(d, dir+"/") {
			out = append(out, d)
		}
	}
	slices.Sort(out)
	return out, nil
}

func (f *fakeFS) ReadFile(p string) ([]byte, error) {
	if raw, ok := f.files[p]; ok {
		return raw, nil
	}
	return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
}

func (f *fakeFS) CDIEdits(_, devices []string) (*cdispecs.ContainerEdits, error) {
	edits := &cdi.ContainerEdits{}
	for _, d := range devices {
		if f.cdi[d] == nil {
			return nil, invalid("CDI device %s is unknown", d)
		}
		edits.Append(&cdi.ContainerEdits{ContainerEdits: f.cdi[d]})
	}
	return edits.ContainerEdits, nil
}

const (
	testRootfs = "/data/rootfs/c1/merged"
	testPasswd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:/bin/false\napp:x:1000:1001::/home/app:/bin/sh\n" +
		"far:x:70000:70000::/:/bin/sh\n"
	testGroup = "root:x:0:\nwww-data:x:33:\ntape:x:26:app\npredefined:x:50000:app,www-data\nstaff:x:2000:\n"
)

func fakeUsers(files map[string]string) Users {
	return func(p string) ([]byte, error) {
		if s, ok := files[p]; ok {
			return []byte(s), nil
		}
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
	}
}

// request is a request that BuildSpec accepts; each test changes what it is about.
func request(change ...func(*SpecRequest)) SpecRequest {
	req := SpecRequest{
		ID:        "c1",
		Pod:       &runtimeapi.PodSandboxConfig{Hostname: "web-0"},
		Container: &runtimeapi.ContainerConfig{Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}}},
		Image:     ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}},
		Rootfs:    testRootfs,
		Namespaces: Namespaces{
			Net: "/run/pods/p1/ns/net", IPC: "/run/pods/p1/ns/ipc", UTS: "/run/pods/p1/ns/uts", PID: "/proc/9/ns/pid",
		},
		Users: fakeUsers(map[string]string{"/etc/passwd": testPasswd, "/etc/group": testGroup}),
		Host: Host{
			Controllers: map[string]bool{}, Seccomp: true,
			IDs: IDMap{UIDs: []IDRange{{0, 1}, {1, 65536}}, GIDs: []IDRange{{0, 1}, {1, 65536}}},
			FS:  &fakeFS{},
		},
	}
	for _, c := range change {
		c(&req)
	}
	return req
}

// security changes the security context.
func security(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*SpecRequest) {
	return func(r *SpecRequest) { change(r.Container.Linux.SecurityContext) }
}

func build(t *testing.T, change ...func(*SpecRequest)) (*specs.Spec, []string) {
	t.Helper()
	spec, sentences, err := BuildSpec(request(change...))
	if err != nil {
		t.Fatal(err)
	}
	return spec, sentences
}

// refused checks that BuildSpec fails with an error that wraps class and speaks of each of words.
func refused(t *testing.T, class error, words []string, change ...func(*SpecRequest)) {
	t.Helper()
	_, _, err := BuildSpec(request(change...))
	if !errors.Is(err, class) {
		t.Fatalf("error %v; want one that wraps %v", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not speak of %q", err, w)
		}
	}
}

func mountAt(spec *specs.Spec, destination string) *specs.Mount {
	for i := range spec.Mounts {
		if spec.Mounts[i].Destination == destination {
			return &spec.Mounts[i]
		}
	}
	return nil
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}
