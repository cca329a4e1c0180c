package netslirp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// packages names the package of a program, by package manager, where it is not the program's own name.
var packages = map[string]map[string]string{
	"ip":      {"apt-get": "iproute2", "dnf": "iproute", "zypper": "iproute2", "pacman": "iproute2", "apk": "iproute2"},
	"nsenter": {"apt-get": "util-linux", "dnf": "util-linux", "zypper": "util-linux", "pacman": "util-linux", "apk": "util-linux-misc"},
}

func checkProgram(binary, program string) error {
	_, err := exec.LookPath(binary)
	switch {
	case err == nil:
		return nil
	case binary != program:
		return fmt.Errorf("%s is to be the program %s, which cannot be run (%w); name another by --network-program, or none for the one in PATH; to install that, run: %s",
			program, binary, err, installCommand(program))
	}
	return fmt.Errorf("%s is not installed (%w); run: %s", program, err, installCommand(program))
}

// installCommand is the command that installs program on this distribution.
func installCommand(program string) string {
	raw, err := os.ReadFile("/etc/os-release")
	if err != nil {
		raw, _ = os.ReadFile("/usr/lib/os-release") // os-release(5): the fallback; neither means "unknown"
	}
	return installCommandFor(string(raw), program)
}

func installCommandFor(osRelease, program string) string {
	manager, command := "apt-get", "sudo apt-get install -y"
	for _, id := range distributions(osRelease) {
		switch id {
		case "debian", "ubuntu":
			manager, command = "apt-get", "sudo apt-get install -y"
		case "fedora", "rhel", "centos":
			manager, command = "dnf", "sudo dnf install -y"
		case "suse", "opensuse", "sles":
			manager, command = "zypper", "sudo zypper install -y"
		case "arch":
			manager, command = "pacman", "sudo pacman -S --noconfirm"
		case "alpine":
			manager, command = "apk", "sudo apk add"
		default:
			continue
		}
		break
	}
	name := program
	if p := packages[program][manager]; p != "" {
		name = p
	}
	return command + " " + name
}

// distributions lists the values of ID and ID_LIKE, the distribution's own first.
func distributions(osRelease string) []string {
	var own, like []string
	for line := range strings.Lines(osRelease) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			own = strings.Fields(value)
		case "ID_LIKE":
			like = strings.Fields(value)
		}
	}
	return append(own, like...)
}

// checkTun opens the device that a TAP interface is made with. Opening it makes nothing.
func checkTun(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s does not exist: the tun module is not loaded, or this container was not given the device; "+
			"run: sudo modprobe tun; sudo mkdir -p /dev/net; test -e %s || sudo mknod -m 0666 %s c 10 200", path, path, path)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s has no driver behind it (%w); run: sudo modprobe tun", path, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s may not be opened by this user; run: sudo chmod 0666 %s", path, path)
	case errors.Is(err, unix.EPERM):
		// The device controller of a cgroup answers EPERM, file modes EACCES.
		return fmt.Errorf("%s is denied by the container that this runs in; start that container with: --device /dev/net/tun", path)
	default:
		return fmt.Errorf("open %s: %w", path, err)
	}
}
