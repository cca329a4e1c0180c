package ctr

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type resources = runtimeapi.LinuxContainerResources

func asking(r *resources) func(*SpecRequest) {
	return func(req *SpecRequest) { req.Container.Linux.Resources = r }
}

// delegated gives the container a cgroup with these controllers.
func delegated(controllers ...string) func(*SpecRequest) {
	return func(r *SpecRequest) {
		r.Host.CgroupUsable, r.CgroupsPath = true, "/pods/p/c"
		for _, c := range controllers {
			r.Host.Controllers[c] = true
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestResourcesOfControllersInForce(t *testing.T) {
	spec, sentences := build(t, delegated("cpu", "cpuset", "memory", "pids", "hugetlb", "io"), asking(&resources{
		CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, CpusetCpus: "0-1", CpusetMems: "0",
		MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 96 << 20,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB"}},
		Unified:        map[string]string{"pids.max": "100", "io.weight": "default 50", "cgroup.max.depth": "3"},
	}))
	want := &specs.LinuxResources{
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0-1", Mems: "0"},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(96 << 20))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 << 20}, {Pagesize: "1GB"}},
		Unified:        map[string]string{"pids.max": "100", "io.weight": "default 50", "cgroup.max.depth": "3"},
	}
	if !reflect.DeepEqual(spec.Linux.Resources, want) || len(sentences) != 0 {
		t.Errorf("got %+v, sentences %q", spec.Linux.Resources, sentences)
	}
}

func TestResourcesThatCannotBeApplied(t *testing.T) {
	for _, c := range []struct {
		name      string
		host      func(*SpecRequest)
		ask       *resources
		sentences []string // a word of each
		applied   bool     // something is left
	}{
		{"nothing asked", delegated(), &resources{}, nil, false},
		{"no controller", delegated(), &resources{MemoryLimitInBytes: 1 << 20}, []string{"memory limit 1048576 bytes is not applied: the controller memory"}, false},
		{"one controller of two", delegated("cpu"), &resources{MemoryLimitInBytes: 1 << 20, CpuShares: 100}, []string{"controller memory"}, true},
		{"one sentence a controller", delegated(), &resources{CpuShares: 100, CpuQuota: 5000, CpuPeriod: 10000, CpusetCpus: "1"},
			[]string{"cpu shares 100, cpu quota 5000 us, cpu period 10000 us are not applied", "cpuset"}, false},
		{"no cgroups", func(*SpecRequest) {}, &resources{MemoryLimitInBytes: 1 << 20}, []string{"no cgroups"}, false},
		{"the kubelet's of a container that asks for nothing", delegated(),
			&resources{CpuShares: 2, CpuPeriod: 100000, HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}}}, nil, false},
		{"hugepages", delegated("memory"), &resources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}}, []string{"hugepages 2MB"}, false},
		{"unified", delegated("memory"), &resources{Unified: map[string]string{"memory.high": "1", "io.max": "x"}}, []string{"io.max=x"}, true},
		{"the kubelet's of a container on cgroup v2", delegated("cpu"),
			&resources{CpuShares: 2, Unified: map[string]string{"memory.oom.group": "1", "memory.min": "0", "memory.low": "0", "memory.high": "max"}}, nil, true},
		{"a protection is a limit of others", delegated(), &resources{Unified: map[string]string{"memory.min": "1"}}, []string{"memory.min=1"}, false},
		{"no limit is no loss", delegated(), &resources{MemoryLimitInBytes: -1, MemorySwapLimitInBytes: -1, CpuQuota: -1}, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, sentences := build(t, c.host, asking(c.ask))
			if len(sentences) != len(c.sentences) {
				t.Fatalf("sentences %q, want %d", sentences, len(c.sentences))
			}
			for i, word := range c.sentences {
				if !strings.Contains(sentences[i], word) {
					t.Errorf("sentence %q does not say %q", sentences[i], word)
				}
			}
			if got := spec.Linux.Resources != nil; got != c.applied {
				t.Errorf("resources %+v", spec.Linux.Resources)
			}
			strict := func(r *SpecRequest) { r.Host.Strict = true }
			if len(c.sentences) == 0 {
				build(t, c.host, asking(c.ask), strict)
				return
			}
			refused(t, ErrUnsupported, append([]string{"strict"}, c.sentences...), c.host, asking(c.ask), strict)
		})
	}
}

// TestAMemoryLimitIsOneOfSwapToo: unless the request says something else of swap.
func TestAMemoryLimitIsOneOfSwapToo(t *testing.T) {
	for _, c := range []struct {
		ask  *resources
		want *int64
	}{
		{&resources{MemoryLimitInBytes: 1 << 20}, ptr(int64(1 << 20))},
		{&resources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20}, ptr(int64(2 << 20))},
		{&resources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: -1}, ptr(int64(-1))},
		{&resources{MemoryLimitInBytes: 1 << 20, Unified: map[string]string{"memory.swap.max": "4096"}}, nil},
		{&resources{MemoryLimitInBytes: -1}, nil},
	} {
		if spec, _ := build(t, delegated("memory"), asking(c.ask)); !reflect.DeepEqual(spec.Linux.Resources.Memory.Swap, c.want) {
			t.Errorf("%v: swap %v, want %v", c.ask, spec.Linux.Resources.Memory.Swap, c.want)
		}
	}
}

func TestResourcesThatMakeNoSense(t *testing.T) {
	for word, r := range map[string]*resources{
		"without a memory limit": {MemorySwapLimitInBytes: 1},
		"below":                  {MemorySwapLimitInBytes: 1, MemoryLimitInBytes: 2},
		"memory limit -5":        {MemoryLimitInBytes: -5},
		"negative":               {CpuShares: -1},
		"oom_score_adj 1001":     {OomScoreAdj: 1001},
		"a/b.c":                  {Unified: map[string]string{"a/b.c": ""}},
		"nodot":                  {Unified: map[string]string{"nodot": ""}},
		"cgroup.procs":           {Unified: map[string]string{"cgroup.procs": "1"}},
		"cgroup.kill":            {Unified: map[string]string{"cgroup.kill": "1"}},
	} {
		refused(t, ErrInvalid, []string{word}, delegated("memory", "cpu"), asking(r))
	}
}

func TestOOMScoreAdjIsClamped(t *testing.T) {
	for _, c := range []struct {
		own, asked int
		want       *int
		sentence   bool
	}{
		{0, 0, nil, false}, {0, 500, ptr(500), false}, {0, -997, ptr(0), true}, {200, 100, ptr(200), true}, {-500, -400, ptr(-400), false}, {0, 1000, ptr(1000), false},
	} {
		spec, sentences := build(t, asking(&resources{OomScoreAdj: int64(c.asked)}), func(r *SpecRequest) {
			r.Host.OOMScoreAdjMin, r.Host.Strict = c.own, true // the CRI lets a runtime clamp: no policy forbids it
		})
		if !reflect.DeepEqual(spec.Process.OOMScoreAdj, c.want) || (len(sentences) == 1) != c.sentence {
			t.Errorf("own %d, asked %d: got %v, sentences %q", c.own, c.asked, spec.Process.OOMScoreAdj, sentences)
		}
	}
}

func deviceFS() *fakeFS {
	return &fakeFS{
		devs:  map[string]bool{"/dev/fuse": true, "/dev/null": true, "/dev/zero": true, "/dev/snd/pcm": true, "/dev/snd/by/id": true, "/srv/disk": true},
		dirs:  map[string]bool{"/dev/snd": true, "/dev/empty": true},
		files: map[string][]byte{"/etc/motd": nil},
		links: map[string]string{"/dev/alias": "/dev/fuse"},
		flags: map[string][]string{"/srv/disk": {"nodev"}},
	}
}

func withDevices(devices ...*runtimeapi.Device) func(*SpecRequest) {
	return func(r *SpecRequest) { r.Host.FS, r.Container.Devices = deviceFS(), devices }
}

func TestDevices(t *testing.T) {
	for _, c := range []struct {
		name   string
		device *runtimeapi.Device
		want   map[string]string // container path → source
	}{
		{"one", &runtimeapi.Device{HostPath: "/dev/fuse", ContainerPath: "/dev/f", Permissions: "mrw"}, map[string]string{"/dev/f": "/dev/fuse"}},
		{"same path", &runtimeapi.Device{HostPath: "/dev/fuse", Permissions: "rw"}, map[string]string{"/dev/fuse": "/dev/fuse"}},
		{"symbolic link", &runtimeapi.Device{HostPath: "/dev/alias", ContainerPath: "/dev/alias"}, map[string]string{"/dev/alias": "/dev/fuse"}},
		{"directory", &runtimeapi.Device{HostPath: "/dev/snd", ContainerPath: "/dev/audio"},
			map[string]string{"/dev/audio/pcm": "/dev/snd/pcm", "/dev/audio/by/id": "/dev/snd/by/id"}},
		{"one that is there already", &runtimeapi.Device{HostPath: "/dev/null", ContainerPath: "/dev/null"}, map[string]string{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, sentences := build(t, withDevices(c.device))
			got := map[string]string{}
			for _, m := range spec.Mounts {
				if slices.Equal(m.Options, []string{"bind", "rprivate"}) {
					got[m.Destination] = m.Source
				}
			}
			if !reflect.DeepEqual(got, c.want) || len(sentences) != 0 || len(spec.Linux.Devices) != 0 {
				t.Errorf("got %v, want %v; sentences %q", got, c.want, sentences)
			}
		})
	}
	readonly := withDevices(&runtimeapi.Device{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "r"})
	if _, sentences := build(t, readonly); len(sentences) != 1 || !strings.Contains(sentences[0], "device cgroup") {
		t.Errorf("sentences %q, want one on the device cgroup", sentences)
	}
	refused(t, ErrUnsupported, []string{"strict", "/dev/fuse"}, readonly, func(r *SpecRequest) { r.Host.Strict = true })
	for _, c := range []struct {
		class error
		word  string
		d     *runtimeapi.Device
	}{
		{ErrInvalid, "does not exist", &runtimeapi.Device{HostPath: "/dev/none"}},
		{ErrInvalid, "neither a device", &runtimeapi.Device{HostPath: "/etc/motd"}},
		{ErrInvalid, "no device", &runtimeapi.Device{HostPath: "/dev/empty"}},
		{ErrInvalid, "below /dev", &runtimeapi.Device{HostPath: testRootfs}},
		{ErrInvalid, "permissions", &runtimeapi.Device{HostPath: "/dev/fuse", Permissions: "rx"}},
		{ErrInvalid, "absolute", &runtimeapi.Device{HostPath: "fuse"}},
		{ErrUnsupported, "nodev", &runtimeapi.Device{HostPath: "/srv/disk"}},
		{ErrUnsupported, "own device", &runtimeapi.Device{HostPath: "/dev/zero", ContainerPath: "/dev/null"}},
	} {
		refused(t, c.class, []string{c.word}, withDevices(c.d))
	}
}

func TestADeviceAskedForOutranksThePrivilegedContainersOwn(t *testing.T) {
	spec, _ := build(t, withDevices(&runtimeapi.Device{HostPath: "/dev/zero", ContainerPath: "/dev/fuse"}),
		security(func(s *securityContext) { s.Privileged = true }))
	var sources []string
	for _, m := range spec.Mounts {
		if m.Destination == "/dev/fuse" {
			sources = append(sources, m.Source)
		}
	}
	equal(t, "mounts on /dev/fuse", sources, []string{"/dev/zero"})
}
