package cgroupv2

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// machine is a directory with the files that Find reads.
type machine struct {
	mountinfo string
	own       string            // /proc/self/cgroup
	files     map[string]string // further files; a path that ends in "/" is a directory
	groups    map[string]cgroup // directories with cgroup files
}

type cgroup struct {
	controllers string
	procs       string
	kind        string // "" = domain
	ours        bool
}

const (
	mountV2     = "31 23 0:28 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
	mountHybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n" +
		"35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n" +
		"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	mountV1  = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
	v1Groups = "6:blkio:/\n5:pids:/\n4:memory:/\n3:cpuset:/\n2:cpu,cpuacct:/\n1:name=systemd:/\n"
	userDir  = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
	all      = "cpuset cpu io memory hugetlb pids rdma misc"
	testPid  = 4242
)

func (m machine) build(t *testing.T) host {
	t.Helper()
	root := t.TempDir()
	put := func(path, content string) {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, "/") {
			if err := os.MkdirAll(full, 0o755); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("/proc/self/mountinfo", m.mountinfo)
	put("/proc/self/cgroup", m.own)
	for path, content := range m.files {
		put(path, content)
	}
	var writable []string
	for path, g := range m.groups {
		kind := g.kind
		if kind == "" {
			kind = "domain"
		}
		put(path+"/cgroup.controllers", g.controllers+"\n")
		put(path+"/cgroup.procs", g.procs)
		put(path+"/cgroup.subtree_control", "\n")
		put(path+"/cgroup.type", kind+"\n")
		if g.ours {
			writable = append(writable, path)
		}
	}
	return host{root: root, pid: testPid, uid: 1000, writable: func(path string) error {
		dir := strings.TrimPrefix(path, root)
		if strings.HasPrefix(filepath.Base(dir), "cgroup.") {
			dir = filepath.Dir(dir)
		}
		if slices.Contains(writable, dir) {
			return nil
		}
		return unix.EACCES
	}}
}

func TestFind(t *testing.T) {
	tests := map[string]struct {
		machine
		starter     int
		path        string
		controllers string
		sentence    []string // words that must be there
		hint        []string // nil = no hint at all
	}{
		"systemd, scope with Delegate=yes": {
			machine: machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1.scope\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup":                    {controllers: all},
					userDir:                             {controllers: "cpuset cpu io memory pids", ours: true},
					userDir + "/app.slice":              {controllers: "cpuset cpu io memory pids", ours: true},
					userDir + "/app.slice/run-r1.scope": {controllers: "cpuset cpu io memory pids", procs: "4242\n", ours: true},
				}},
			path: userDir + "/app.slice/run-r1.scope", controllers: "cpuset cpu io memory pids",
			sentence: []string{"run-r1.scope", "with controllers cpuset cpu"},
		},
		"systemd, only memory and pids delegated": {
			machine: machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1.scope\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup":                    {controllers: all},
					userDir + "/app.slice/run-r1.scope": {controllers: "memory pids", procs: "4242\n", ours: true},
				}},
			path: userDir + "/app.slice/run-r1.scope", controllers: "memory pids",
			sentence: []string{"memory pids"},
			hint:     []string{"cpu cpuset io: not delegated", "Delegate=cpu cpuset io memory pids", "daemon-reload"},
		},
		"systemd, `up --detach` in its own scope": {
			machine: machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1.scope\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup":                    {controllers: all},
					userDir + "/app.slice/run-r1.scope": {controllers: "cpuset cpu io memory pids", procs: "4200\n4242\n", ours: true},
				}},
			starter: 4200,
			path:    userDir + "/app.slice/run-r1.scope", controllers: "cpuset cpu io memory pids",
			sentence: []string{"with controllers"},
		},
		"systemd, terminal's scope with a shell": {
			machine: machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup":                 {controllers: all},
					userDir + "/app.slice":           {controllers: "cpuset cpu io memory pids", ours: true}, // systemd's, not ours to change
					userDir + "/app.slice/vte.scope": {controllers: "cpuset cpu io memory pids", procs: "77\n4242\n", ours: true},
				}},
			path:     userDir + "/app.slice/vte.scope",
			sentence: []string{"without controllers", "killing work"},
			hint:     []string{"holds other processes (pid 77)", "only where there are none", "sudo systemd-run --uid=1000 -p Delegate=yes"},
		},
		"systemd, ssh session": {
			machine: machine{mountinfo: mountV2, own: "0::/user.slice/user-1000.slice/session-1.scope\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup": {controllers: all},
					"/sys/fs/cgroup/user.slice/user-1000.slice/session-1.scope": {controllers: "memory pids", procs: "4242\n"},
				}},
			sentence: []string{"uid 1000 may not write", "session-1.scope"},
			hint:     []string{"sudo systemd-run --uid=1000 -p Delegate=yes"},
		},
		"systemd unit with DelegateSubgroup": {
			machine: machine{mountinfo: mountV2, own: "0::/system.slice/ci.service/runner\n",
				files: map[string]string{"/run/systemd/system/": ""},
				groups: map[string]cgroup{
					"/sys/fs/cgroup":                                {controllers: all},
					"/sys/fs/cgroup/system.slice/ci.service":        {controllers: "cpuset cpu io memory pids", ours: true},
					"/sys/fs/cgroup/system.slice/ci.service/runner": {procs: "11\n4242\n", ours: true},
				}},
			path: "/sys/fs/cgroup/system.slice/ci.service", controllers: "cpuset cpu io memory pids",
			sentence: []string{"ci.service with"},
		},
		"pure v2, subtree handed over, shell in a leaf": {
			machine: machine{mountinfo: mountV2, own: "0::/coracle-1000/shell\n", groups: map[string]cgroup{
				"/sys/fs/cgroup":                    {controllers: all, procs: "1\n"},
				"/sys/fs/cgroup/coracle-1000":       {controllers: "cpuset cpu io memory pids", ours: true},
				"/sys/fs/cgroup/coracle-1000/shell": {procs: "9\n4242\n", ours: true},
			}},
			path: "/sys/fs/cgroup/coracle-1000", controllers: "cpuset cpu io memory pids",
			sentence: []string{"/sys/fs/cgroup/coracle-1000 with"},
		},
		"pure v2, alone in a leaf without controllers below one that has them": {
			machine: machine{mountinfo: mountV2, own: "0::/ci/job\n", groups: map[string]cgroup{
				"/sys/fs/cgroup":        {controllers: all},
				"/sys/fs/cgroup/ci":     {controllers: "cpuset cpu io memory pids", ours: true},
				"/sys/fs/cgroup/ci/job": {procs: "4242\n", ours: true},
			}},
			path: "/sys/fs/cgroup/ci", controllers: "cpuset cpu io memory pids",
			sentence: []string{"/ci with"},
		},
		"pure v2, subtree handed over with the shell in it": {
			machine: machine{mountinfo: mountV2, own: "0::/ci\n", groups: map[string]cgroup{
				"/sys/fs/cgroup":    {controllers: all},
				"/sys/fs/cgroup/ci": {controllers: "cpuset cpu io memory pids", procs: "1\n2\n3\n4\n4242\n", ours: true},
			}},
			path:     "/sys/fs/cgroup/ci",
			sentence: []string{"without controllers"},
			hint:     []string{"pids 1, 2, 3, …", "mkdir -p /sys/fs/cgroup/ci/shell"},
		},
		"pure v2, nothing enabled above": {
			machine: machine{mountinfo: mountV2, own: "0::/a/b\n", groups: map[string]cgroup{
				"/sys/fs/cgroup":     {controllers: "cpu memory pids"},
				"/sys/fs/cgroup/a":   {},
				"/sys/fs/cgroup/a/b": {procs: "4242\n", ours: true},
			}},
			path:     "/sys/fs/cgroup/a/b",
			sentence: []string{"without controllers"},
			hint:     []string{`for d in /sys/fs/cgroup /sys/fs/cgroup/a; do echo "+cpu +memory +pids"`},
		},
		"pure v2, threaded cgroup": {
			machine: machine{mountinfo: mountV2, own: "0::/a\n", groups: map[string]cgroup{
				"/sys/fs/cgroup":   {controllers: all},
				"/sys/fs/cgroup/a": {controllers: "cpu pids", procs: "4242\n", ours: true, kind: "threaded"},
			}},
			sentence: []string{"may not write"},
			hint:     []string{"sudo sh -c", "/sys/fs/cgroup/coracle-1000/shell", "chown 1000"},
		},
		"hybrid, subtree handed over": {
			machine: machine{mountinfo: mountHybrid, own: v1Groups + "0::/dev\n", groups: map[string]cgroup{
				"/sys/fs/cgroup/unified":     {controllers: "hugetlb"},
				"/sys/fs/cgroup/unified/dev": {procs: "4242\n", ours: true},
			}},
			path:     "/sys/fs/cgroup/unified/dev",
			sentence: []string{"/sys/fs/cgroup/unified/dev without controllers"},
			hint:     []string{"cpu cpuset io memory pids: held by cgroup v1", "systemd.unified_cgroup_hierarchy=1"},
		},
		"hybrid, nothing delegated": {
			machine: machine{mountinfo: mountHybrid, own: v1Groups + "0::/\n", groups: map[string]cgroup{
				"/sys/fs/cgroup/unified": {controllers: "hugetlb", procs: "1\n4242\n"},
			}},
			sentence: []string{"may not write", "/sys/fs/cgroup/unified:"},
			hint:     []string{"mkdir -p /sys/fs/cgroup/unified/coracle-1000/shell"},
		},
		"v1 only": {
			machine:  machine{mountinfo: mountV1, own: v1Groups},
			sentence: []string{"no cgroup v2 hierarchy"},
			hint:     []string{"systemd.unified_cgroup_hierarchy=1"},
		},
		"v1 mounted, v2 known": {
			machine:  machine{mountinfo: mountV1, own: v1Groups + "0::/\n"},
			sentence: []string{"only cgroup v1"},
			hint:     []string{"systemd.unified_cgroup_hierarchy=1"},
		},
		"nothing mounted": {
			machine:  machine{own: "0::/\n"},
			sentence: []string{"no cgroup2 file system"},
			hint:     []string{"mount -t cgroup2"},
		},
		"container, read-only": {
			machine:  machine{mountinfo: strings.Replace(mountV2, " rw,nosuid", " ro,nosuid", 1), own: "0::/\n"},
			sentence: []string{"read-only"},
			hint:     []string{"--cgroupns=private"},
		},
		"container, host's cgroup namespace": {
			machine:  machine{mountinfo: strings.Replace(mountV2, " / ", " /docker/c1 ", 1), own: "0::/docker/c1\n"},
			sentence: []string{"does not show"},
			hint:     []string{"--cgroupns=private"},
		},
		"inside somebody's cgroup namespace, standing outside": {
			machine:  machine{mountinfo: mountV2, own: "0::/../session-1.scope\n"},
			sentence: []string{"does not show"},
			hint:     []string{"--cgroupns=private"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			h := test.build(t)
			h.starter = test.starter
			d, err := h.find()
			if err != nil {
				t.Fatal(err)
			}
			if d.Path != test.path {
				t.Errorf("path %q, want %q", d.Path, test.path)
			}
			if got := strings.Join(d.Controllers, " "); got != test.controllers {
				t.Errorf("controllers %q, want %q", got, test.controllers)
			}
			for _, words := range test.sentence {
				if !strings.Contains(d.Sentence, words) {
					t.Errorf("sentence %q lacks %q", d.Sentence, words)
				}
			}
			if test.hint == nil && d.Hint != "" {
				t.Errorf("hint %q, want none", d.Hint)
			}
			for _, words := range test.hint {
				if !strings.Contains(d.Hint, words) {
					t.Errorf("hint %q lacks %q", d.Hint, words)
				}
			}
		})
	}
}

func TestFindWithoutProc(t *testing.T) {
	if _, err := (host{root: t.TempDir()}).find(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that of the missing file", err)
	}
}

func TestParseMount(t *testing.T) {
	tests := map[string]mountPoint{
		`41 31 0:38 /a\040b /mnt/c\134d rw,relatime shared:1 master:2 - cgroup2 cgroup2 ro`: {root: "/a b", point: `/mnt/c\d`, kind: "cgroup2", readOnly: true},
		`41 31 0:38 / /x rw - tmpfs tmpfs rw`:                                               {root: "/", point: "/x", kind: "tmpfs"},
	}
	for line, want := range tests {
		if got, ok := parseMount(line); !ok || got != want {
			t.Errorf("%s: %+v, want %+v", line, got, want)
		}
	}
	for _, line := range []string{"", "1 2 3", "41 31 0:38 / /x rw tmpfs tmpfs rw"} {
		if got, ok := parseMount(line); ok {
			t.Errorf("%q: %+v, want nothing", line, got)
		}
	}
}

func TestMountedInside(t *testing.T) {
	tmpfs := "50 40 0:50 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
	inner := "51 50 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
	outer := "31 23 0:28 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
	for text, want := range map[string]bool{
		"": false, mountHybrid: false, mountV2: false, outer: false, outer + tmpfs: false, outer + tmpfs + inner: true, tmpfs + outer: false,
	} {
		if got := mountedInside(text); got != want {
			t.Errorf("%v, want %v for\n%s", got, want, text)
		}
	}
}
