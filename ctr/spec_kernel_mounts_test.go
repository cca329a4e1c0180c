package ctr

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// mountTmpfs mounts a tmpfs with flags on dir until the end of the test.
func mountTmpfs(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", flags, "mode=755"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

func volumes(mounts ...*runtimeapi.Mount) func(*SpecRequest) {
	return func(r *SpecRequest) { r.Container.Mounts = mounts }
}

func TestMountsInTheKernel(t *testing.T) {
	base := realDir(t, "vol")
	strict, plain, image := base+"/strict", base+"/plain", base+"/image"
	mountTmpfs(t, strict, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME)
	mountTmpfs(t, plain, 0)
	mountTmpfs(t, plain+"/sub", 0)
	mountTmpfs(t, image, 0)
	must(t, os.WriteFile(plain+"/file", []byte("content\n"), 0o644))
	must(t, os.Symlink("plain", base+"/link"))
	got := runScript(t, status+`
		for m in strict strictro ro rro opts image; do echo "$m=$(flags /v/$m)"; done
		echo "ro.write=$(can touch /v/ro/x)"; echo "ro.sub=$(can touch /v/ro/sub/x)"; echo "rro.sub=$(can touch /v/rro/sub/x)"
		echo "rw=$(can touch /v/rw/x)"; echo "nested=$(cat /v/rw/sub/inner/file)"; echo "link=$(cat /v/link/file)"
		echo "hosts=$(cat /etc/hosts)"; echo "full=$(can sh -c 'echo x > /dev/mine')"; echo "isdev=$(can test -c /dev/mine)"
	`, volumes(
		&runtimeapi.Mount{HostPath: plain + "/file", ContainerPath: "/v/rw/sub/inner/file"}, // before its parents
		&runtimeapi.Mount{HostPath: plain + "/sub", ContainerPath: "/v/rw/sub"},
		&runtimeapi.Mount{HostPath: plain, ContainerPath: "/v/rw"},
		&runtimeapi.Mount{HostPath: strict, ContainerPath: "/v/strict"},
		&runtimeapi.Mount{HostPath: strict, ContainerPath: "/v/strictro", Readonly: true},
		&runtimeapi.Mount{HostPath: plain, ContainerPath: "/v/ro", Readonly: true},
		&runtimeapi.Mount{HostPath: plain, ContainerPath: "/v/rro", Readonly: true, RecursiveReadOnly: true},
		&runtimeapi.Mount{HostPath: plain, ContainerPath: "/v/opts", MountOptions: []string{"noexec", "nosuid"}},
		&runtimeapi.Mount{HostPath: base + "/link", ContainerPath: "/v/link"},
		&runtimeapi.Mount{Image: &runtimeapi.ImageSpec{Image: "i"}, ContainerPath: "/v/image"},
	), func(r *SpecRequest) {
		r.ImageMounts = map[string]string{"/v/image": image}
		r.Files.Hosts = plain + "/file"
		r.Container.Devices = []*runtimeapi.Device{{HostPath: "/dev/full", ContainerPath: "/dev/mine", Permissions: "rw"}}
	})
	expect(t, got, map[string]string{
		"strict": "rw,nosuid,nodev,noexec,noatime", "strictro": "ro,nosuid,nodev,noexec,noatime", "ro": "ro,relatime", "rro": "ro,relatime",
		"opts": "rw,nosuid,noexec,relatime", "image": "ro,relatime",
		"ro.write": "no", "ro.sub": "yes", "rro.sub": "no", "rw": "yes", "nested": "content", "link": "content", "hosts": "content",
		"full": "no", "isdev": "yes",
	})
}

// TestTheNodesDevInTheKernel: nothing of the node's /dev belongs to the node's user, so nothing can be made in it.
func TestTheNodesDevInTheKernel(t *testing.T) {
	for _, privileged := range []bool{false, true} {
		got := runScript(t, status+`
			echo "null=$(can sh -c 'echo x >/dev/null')"; echo "same=$(can test /dev -ef /nodedev)"
			below() { cut -d' ' -f5 /proc/self/mountinfo | grep -c "^$1/"; }
			echo "below=$(test "$(below /dev)" = "$(below /nodedev)" && echo same)"
		`, volumes(
			&runtimeapi.Mount{HostPath: "/dev", ContainerPath: "/dev"}, &runtimeapi.Mount{HostPath: "/dev", ContainerPath: "/nodedev"},
		), security(func(s *securityContext) { s.Privileged = privileged }))
		expect(t, got, map[string]string{"null": "yes", "same": "yes", "below": "same"})
	}
}

func TestPropagationInTheKernel(t *testing.T) {
	source := realDir(t, "shared")
	mountTmpfs(t, source, 0)
	must(t, unix.Mount("", source, "", unix.MS_SHARED, ""))
	for _, c := range []struct {
		propagation runtimeapi.MountPropagation
		down, up    bool // mounts of the node reach the container, and the other way
	}{{private, false, false}, {hostToGuest, true, false}, {bidirectional, true, true}} {
		t.Run(c.propagation.String(), func(t *testing.T) {
			for _, d := range []string{"down", "up"} {
				must(t, os.Mkdir(filepath.Join(source, d), 0o755))
				t.Cleanup(func() { must(t, os.Remove(filepath.Join(source, d))) })
			}
			spec, _, err := BuildSpec(kernelRequest(t, `mount -t tmpfs tmpfs /vol/up && touch /vol/up/x
				while ! test -e /vol/go; do sleep 0.02; done; ls /vol/down; umount /vol/up`,
				volumes(&runtimeapi.Mount{HostPath: source, ContainerPath: "/vol", Propagation: c.propagation}),
				security(func(s *securityContext) { s.Privileged = true })))
			must(t, err)
			r := start(t, spec)
			mountTmpfs(t, filepath.Join(source, "down"), 0)
			must(t, os.WriteFile(filepath.Join(source, "down/seen"), nil, 0o644))
			up := func() bool { _, err := os.Stat(filepath.Join(source, "up/x")); return err == nil }
			for end := time.Now().Add(2 * time.Second); c.up && !up() && time.Now().Before(end); {
				time.Sleep(10 * time.Millisecond)
			}
			gotUp := up()
			must(t, os.WriteFile(filepath.Join(source, "go"), nil, 0o644))
			out, code := r.wait()
			must(t, os.Remove(filepath.Join(source, "go")))
			if gotDown := strings.TrimSpace(out) == "seen"; code != 0 || gotDown != c.down || gotUp != c.up {
				t.Errorf("down %v, up %v, exit code %d, output %q; want down %v, up %v", gotDown, gotUp, code, out, c.down, c.up)
			}
		})
	}
	if p, err := (nodeFS{}).Propagation(source); err != nil || !p.Shared || p.Slave {
		t.Errorf("propagation of a shared mount: %+v, %v", p, err)
	}
	if p, err := (nodeFS{}).Propagation("/"); err != nil || p.Shared {
		t.Errorf("propagation of a private mount: %+v, %v", p, err)
	}
}

// TestCDIInTheKernel: from a specification on disk to what a container sees.
func TestCDIInTheKernel(t *testing.T) {
	lib, marks := realDir(t, "lib"), realDir(t, "marks")
	mountTmpfs(t, lib, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC)
	must(t, os.WriteFile(lib+"/libgpu.so", []byte("driver\n"), 0o644))
	groups := "additionalGids: [44], "
	if nstest.IDs() == 1 {
		groups = ""
	}
	dirs := cdiFiles(t, fmt.Sprintf(`cdiVersion: "0.7.0"
kind: vendor.com/gpu
devices:
- name: "0"
  containerEdits:
    deviceNodes: [{path: /dev/gpu0, hostPath: /dev/full, permissions: rw}]
containerEdits: {%senv: [GPU=0],
  mounts: [{hostPath: %s, containerPath: /opt/gpu, options: [ro, nosuid, nodev, bind]}],
  hooks: [{hookName: createContainer, path: /bin/sh, args: [sh, -ec, "touch %s/$HOOK"], env: [HOOK=createContainer, "PATH=/usr/bin:/bin"]}]}
`, groups, lib, marks))
	got := runScript(t, status+`
		echo "env=$GPU"; echo "isdev=$(can test -c /dev/gpu0)"; echo "full=$(can sh -c 'echo x > /dev/gpu0')"
		echo "lib=$(cat /opt/gpu/libgpu.so)"; echo "flags=$(flags /opt/gpu)"; echo "groups=$(id -G)"
	`, func(r *SpecRequest) {
		r.Host.CDISpecDirs = dirs
		r.Container.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/gpu=0"}}
	})
	expect(t, got, map[string]string{"env": "0", "isdev": "yes", "full": "no", "lib": "driver", "flags": "ro,nosuid,nodev,noexec,relatime"})
	if groups != "" {
		expect(t, got, map[string]string{"groups": "0 44"})
	}
	if _, err := os.Stat(filepath.Join(marks, "createContainer")); err != nil {
		t.Errorf("the hook has not run: %v", err)
	}
}

// lockedEnv makes this binary the child of TestMountFlagsNameWhatIsLocked.
const lockedEnv = "CORACLE_TEST_LOCKED"

func init() {
	if dir := os.Getenv(lockedEnv); dir != "" {
		if err := remountLocked(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// remountLocked runs in a user and mount namespace of its own, in which dir's mount is inherited, and so locked.
func remountLocked(dir string) error {
	numbers := map[string]uintptr{
		"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC, "noatime": unix.MS_NOATIME,
		"nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "ro": unix.MS_RDONLY, "strictatime": unix.MS_STRICTATIME,
	}
	names, err := MountFlags(dir)
	if err != nil {
		return err
	}
	var kept uintptr
	for _, n := range names {
		if numbers[n] == 0 {
			return fmt.Errorf("unexpected flag %s", n)
		}
		kept |= numbers[n]
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	const remount = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY
	if err := unix.Mount("", dir, "", remount, ""); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("remount without the locked flags: %s, want EPERM", fmt.Sprint(err))
	}
	if err := unix.Mount("", dir, "", remount|kept, ""); err != nil {
		return fmt.Errorf("remount with %v: %w", names, err)
	}
	after, err := MountFlags(dir)
	if err != nil {
		return err
	}
	if want := append([]string{"ro"}, names...); !slices.Equal(after, want) {
		return fmt.Errorf("flags %v after the remount, want %v", after, want)
	}
	return nil
}

func TestMountFlagsNameWhatIsLocked(t *testing.T) {
	for name, flags := range map[string]uintptr{
		"all": unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME, "nosuid": unix.MS_NOSUID,
		"strict": unix.MS_NODEV | unix.MS_STRICTATIME | unix.MS_NODIRATIME,
	} {
		t.Run(name, func(t *testing.T) {
			dir := realDir(t, "locked")
			mountTmpfs(t, dir, flags)
			child := exec.Command("/proc/self/exe")
			child.Env = append(os.Environ(), lockedEnv+"="+dir)
			ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
			child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: ids, GidMappings: ids}
			if out, err := child.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

func TestSeccompInTheKernel(t *testing.T) {
	if !seccomp.Enabled {
		t.Skip("this test binary is built without the tag seccomp, which needs libseccomp")
	}
	file := realDir(t, "seccomp") + "/p.json"
	must(t, os.WriteFile(file, []byte(strings.ReplaceAll(testProfile, "sethostname", "mkdir")), 0o644))
	profile := func(kind runtimeapi.SecurityProfile_ProfileType, ref string) func(*SpecRequest) {
		return security(func(s *securityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
		})
	}
	const script = status + `field Seccomp; echo "mkdir=$(can mkdir /d)"; echo "unshare=$(can unshare -U true)"`
	expect(t, runScript(t, script), map[string]string{"Seccomp": "0", "mkdir": "yes", "unshare": "yes"})
	expect(t, runScript(t, script, profile(runtimeapi.SecurityProfile_RuntimeDefault, "")),
		map[string]string{"Seccomp": "2", "mkdir": "yes", "unshare": "no"})
	expect(t, runScript(t, script, profile(runtimeapi.SecurityProfile_Localhost, file)),
		map[string]string{"Seccomp": "2", "mkdir": "no", "unshare": "yes"})
}
