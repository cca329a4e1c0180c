package netslirp

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckDriverSaysWhatIsMissing(t *testing.T) {
	must(t, CheckDriver(DriverConfig{}))
	wantIs(t, CheckDriver(DriverConfig{Name: "carrier-pigeon"}), ErrInvalid, `"carrier-pigeon" is unknown, choose one of: slirp4netns`)
	wantIs(t, CheckDriver(DriverConfig{MTU: 65522}), ErrInvalid, "takes 68 to 65521")
	missing := filepath.Join(t.TempDir(), "slirp4netns")
	wantIs(t, CheckDriver(DriverConfig{Binary: missing}), os.ErrNotExist, "the program "+missing)

	bin := t.TempDir()
	t.Setenv("PATH", bin)
	for _, step := range []struct{ program, want string }{
		{"slirp4netns", "slirp4netns is not installed"}, {"ip", "ip is not installed"}, {"nsenter", "nsenter is not installed"}, {"", "does not work"},
	} {
		if err := CheckDriver(DriverConfig{}); err == nil || !strings.Contains(err.Error(), step.want) {
			t.Errorf("error is %v, want %q", err, step.want)
		}
		if step.program != "" {
			must(t, os.WriteFile(filepath.Join(bin, step.program), []byte("#!/bin/sh\nexit 1\n"), 0o755))
		}
	}
}

func TestCheckTun(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "tun")
	if err := checkTun(path); err == nil || !strings.Contains(err.Error(), "sudo modprobe tun; sudo mkdir -p /dev/net; test -e "+path) {
		t.Errorf("missing: %v", err)
	}
	must(t, os.WriteFile(path, nil, 0o000))
	must(t, checkTun(path)) // root of the tests' namespace may
	must(t, OnOwnThread(func() error {
		// Without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH the file's mode counts, as for an ordinary user.
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData // two words, the kernel fills version 3's 64 bits from both
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			return err
		}
		if err := checkTun(path); err == nil || !strings.HasSuffix(err.Error(), "may not be opened by this user; run: sudo chmod 0666 "+path) {
			return errors.Join(errors.New("closed file"), err)
		}
		return nil
	}))
}

func TestInstallCommandFor(t *testing.T) {
	for release, want := range map[string]string{
		"ID=debian\n": "sudo apt-get install -y iproute2",
		"NAME=Ubuntu\nID=ubuntu\nID_LIKE=debian\n":  "sudo apt-get install -y iproute2",
		"ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n": "sudo apt-get install -y iproute2",
		"ID=fedora\n": "sudo dnf install -y iproute",
		"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"": "sudo dnf install -y iproute",
		"ID='opensuse-leap'\nID_LIKE='suse opensuse'":  "sudo zypper install -y iproute2",
		"ID=arch":   "sudo pacman -S --noconfirm iproute2",
		"ID=alpine": "sudo apk add iproute2",
		"":          "sudo apt-get install -y iproute2",
	} {
		if got := installCommandFor(release, "ip"); got != want {
			t.Errorf("%q: %q, want %q", release, got, want)
		}
	}
}

func TestDriversByName(t *testing.T) {
	network, ports, err := ParentDriver(DriverConfig{DisableHostLoopback: true}, t.TempDir())
	if err != nil || network.MTU() != DefaultMTU || ports.OpaqueForChild() == nil {
		t.Errorf("parent's drivers: %v, %v, %v", network, ports, err)
	}
	if _, _, err := ChildDriver("", nil); err != nil {
		t.Error(err)
	}
	_, _, err = ChildDriver("none", nil)
	wantIs(t, err, ErrInvalid, "none")
	_, _, err = ParentDriver(DriverConfig{Name: "none"}, "")
	wantIs(t, err, ErrInvalid, "none")
}

func TestPortLogLeavesOutClosedListeners(t *testing.T) {
	var out strings.Builder
	for _, line := range []string{"accept: accept tcp [::]:8080: use of closed network connection\n", "accept: accept tcp [::]:8080: too many open files\n"} {
		if n, err := (portLog{&out}).Write([]byte(line)); n != len(line) || err != nil {
			t.Errorf("write: %d, %v", n, err)
		}
	}
	if got := out.String(); got != "accept: accept tcp [::]:8080: too many open files\n" {
		t.Errorf("the log has %q", got)
	}
}
