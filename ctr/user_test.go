package ctr

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func id(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }

func TestUser(t *testing.T) {
	type sc = runtimeapi.LinuxContainerSecurityContext
	strict := runtimeapi.SupplementalGroupsPolicy_Strict
	for _, c := range []struct {
		name     string
		image    string
		security *sc
		uid, gid uint32
		groups   []uint32
	}{
		{"nothing said", "", &sc{}, 0, 0, []uint32{0}},
		{"image uid, known", "1000", &sc{}, 1000, 1001, []uint32{26, 1001, 50000}},
		{"image uid, unknown", "4242", &sc{}, 4242, 0, []uint32{0}},
		{"image name", "www-data", &sc{}, 33, 33, []uint32{33, 50000}},
		{"image uid:gid", "1003:1004", &sc{}, 1003, 1004, []uint32{1004}},
		{"image name:gid", "www-data:1004", &sc{}, 33, 1004, []uint32{1004, 50000}},
		{"image name:group", "www-data:staff", &sc{}, 33, 2000, []uint32{2000, 50000}},
		{"image uid:group", "7:staff", &sc{}, 7, 2000, []uint32{2000}},
		{"run_as_user drops the image's group", "9:staff", &sc{RunAsUser: id(1000)}, 1000, 1001, []uint32{26, 1001, 50000}},
		{"run_as_user of nobody known", "", &sc{RunAsUser: id(1234)}, 1234, 0, []uint32{0}},
		{"run_as_user and group", "", &sc{RunAsUser: id(1000), RunAsGroup: id(7)}, 1000, 7, []uint32{7, 26, 50000}},
		{"run_as_user 0 over the image", "app", &sc{RunAsUser: id(0)}, 0, 0, []uint32{0}},
		{"run_as_username", "", &sc{RunAsUsername: "app"}, 1000, 1001, []uint32{26, 1001, 50000}},
		{"run_as_username and group", "", &sc{RunAsUsername: "app", RunAsGroup: id(0)}, 1000, 0, []uint32{0, 26, 50000}},
		{"supplementary groups merge", "", &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234, 26}}, 1000, 1001, []uint32{26, 1001, 1234, 50000}},
		{
			"supplementary groups strict", "", &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234}, SupplementalGroupsPolicy: strict},
			1000, 1001, []uint32{1001, 1234},
		},
		{"last mapped id", "", &sc{RunAsUser: id(65536), RunAsGroup: id(65536)}, 65536, 65536, []uint32{65536}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, _ := build(t, func(r *SpecRequest) {
				r.Image.User = c.image
				r.Container.Linux.SecurityContext = c.security
			})
			u := spec.Process.User
			if u.UID != c.uid || u.GID != c.gid || !slices.Equal(u.AdditionalGids, c.groups) {
				t.Errorf("got %d:%d %v, want %d:%d %v", u.UID, u.GID, u.AdditionalGids, c.uid, c.gid, c.groups)
			}
		})
	}
}

func TestUserIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		class  error
		words  []string
		change func(*runtimeapi.LinuxContainerSecurityContext)
	}{
		{"both", ErrInvalid, []string{"only one"}, func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsUsername = id(1), "app"
		}},
		{"group alone", ErrInvalid, []string{"run_as_group 7 without"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup = id(7) }},
		{"unknown name", ErrInvalid, []string{`"ghost"`, "/etc/passwd"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "ghost" }},
		{"a number as a name", ErrInvalid, []string{`"1000"`}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "1000" }},
		{"name:group", ErrInvalid, []string{"app:staff"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "app:staff" }},
		{"negative", ErrInvalid, []string{"-1"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = id(-1) }},
		{"uid outside the map", ErrUnsupported, []string{"uid 65537", "0-65536", "subuid"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = id(65537) }},
		{"gid outside the map", ErrUnsupported, []string{"gid 100000"}, func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = id(1), id(100000)
		}},
		{"group outside the map", ErrUnsupported, []string{"supplementary gid 100000"}, func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.SupplementalGroups = []int64{100000}
		}},
		{"name outside the map", ErrUnsupported, []string{"70000"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUsername = "far" }},
		{"policy", ErrInvalid, []string{"policy"}, func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroupsPolicy = 9 }},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, c.class, c.words, security(c.change)) })
	}
	refused(t, ErrInvalid, []string{"ghost"}, func(r *SpecRequest) { r.Image.User = "ghost" })
	refused(t, ErrInvalid, []string{"nogroup"}, func(r *SpecRequest) { r.Image.User = "app:nogroup" })
}

func TestAnImageWithoutPasswdTakesNumbersOnly(t *testing.T) {
	bare := func(r *SpecRequest) { r.Users = fakeUsers(nil) }
	spec, _ := build(t, bare, func(r *SpecRequest) { r.Image.User = "12:34" })
	if u := spec.Process.User; u.UID != 12 || u.GID != 34 {
		t.Errorf("got %d:%d, want 12:34", u.UID, u.GID)
	}
	refused(t, ErrInvalid, []string{"app"}, bare, func(r *SpecRequest) { r.Image.User = "app" })
	broken := func(r *SpecRequest) { r.Users = func(string) ([]byte, error) { return nil, syscall.EIO } }
	if _, _, err := BuildSpec(request(broken)); !errors.Is(err, syscall.EIO) {
		t.Errorf("error %v, want EIO", err)
	}
}

func TestSingleIDNode(t *testing.T) {
	single := func(r *SpecRequest) {
		r.Host.IDs = IDMap{UIDs: []IDRange{{0, 1}}, GIDs: []IDRange{{0, 1}}, SetgroupsDenied: true}
	}
	spec, sentences := build(t, single)
	if len(spec.Process.User.AdditionalGids) != 0 || len(sentences) != 0 {
		t.Errorf("groups %v, sentences %q; want none: setgroups(2) is refused", spec.Process.User.AdditionalGids, sentences)
	}
	if pts := mountAt(spec, "/dev/pts"); slices.Contains(pts.Options, "gid=5") {
		t.Errorf("devpts %q names a gid that is not mapped", pts.Options)
	}
	groups := security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{0, 5} })
	if _, sentences := build(t, single, groups); len(sentences) != 1 || !strings.Contains(sentences[0], "[5]") {
		t.Errorf("sentences %q, want one on group 5", sentences)
	}
	refused(t, ErrUnsupported, []string{"strict", "[5]"}, single, groups, func(r *SpecRequest) { r.Host.Strict = true })
	refused(t, ErrUnsupported, []string{"uid 1000"}, single, func(r *SpecRequest) { r.Image.User = "1000:0" })
}

func TestRootfsUsersStaysInsideTheRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(filepath.Dir(root), "secret")
	for path, content := range map[string]string{outside: "outside", filepath.Join(root, "secret"): "inside"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"passwd": "../../../secret", "group": "/secret"} {
		if err := os.Symlink(target, filepath.Join(root, "etc", name)); err != nil {
			t.Fatal(err)
		}
	}
	read := RootfsUsers(root)
	for _, path := range []string{"/etc/passwd", "/etc/group"} {
		if raw, err := read(path); err != nil || string(raw) != "inside" {
			t.Errorf("%s: %q, %v; want the file inside", path, raw, err)
		}
	}
	if _, err := read("/etc/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v, want fs.ErrNotExist", err)
	}
	if err := syscall.Mkfifo(filepath.Join(root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := read("/fifo"); err == nil {
		t.Error("a FIFO was read")
	}
	if err := os.WriteFile(filepath.Join(root, "big"), make([]byte, maxUserFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := read("/big"); err == nil {
		t.Error("a file without measure was read")
	}
}
