package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// shmOptions: 64 MiB as in Docker and the other runtimes of the CRI.
const shmOptions = "mode=1777,size=65536k"

// etcOptions leave room for the longest /etc/hosts that people keep, and for no more.
const etcOptions = "mode=0755,size=16m,nr_inodes=16"

func (p *pod) etcDir() string { return filepath.Join(p.dir, "etc") }

// mountEtc makes a filesystem for the files that containers find at /etc. Containers may write to them without end,
// and the runtime directory, small and the whole user's, is where the node keeps what it must be able to write.
func (p *pod) mountEtc() error {
	if err := os.MkdirAll(p.etcDir(), 0o700); err != nil {
		return fmt.Errorf("make directory of pod files: %w", err)
	}
	if err := unix.Mount("etc", p.etcDir(), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, etcOptions); err != nil {
		return fmt.Errorf("mount pod files: %w", err)
	}
	crash.Point("pod/etc-mounted")
	return nil
}

// writeFiles makes what the containers get at /etc/resolv.conf and /etc/hostname. They are content of the pod
// and no records: a pod whose making is cut off is taken down, not read.
func (s *Service) writeFiles(p *pod) error {
	dns := p.spec.Config.GetDnsConfig()
	resolv, err := s.deps.Network.ResolvConf(dns.GetServers(), dns.GetSearches(), dns.GetOptions())
	if err != nil {
		return fmt.Errorf("make resolv.conf: %w", err)
	}
	files := p.files()
	return errors.Join(
		writeFile(files.ResolvConf, resolv),
		writeFile(files.Hostname, p.spec.Hostname+"\n"))
}

// writeHosts needs the pod's address. The kubelet mounts a file of its own over it; crictl's pods use this one.
func (p *pod) writeHosts(ips []string) error {
	if p.hostNetwork() {
		node, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read the node's hosts file: %w", err)
		}
		return writeFile(p.files().Hosts, string(node))
	}
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, ip := range ips {
		fmt.Fprintf(&b, "%s\t%s\n", ip, p.spec.Hostname)
	}
	return writeFile(p.files().Hosts, b.String())
}

// writeFile: everybody in the pod may read it, whatever the daemon's umask.
func writeFile(path, content string) error {
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write pod file: %w", err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return fmt.Errorf("write pod file: %w", err)
	}
	crash.Point("pod/file-written")
	return nil
}

func (p *pod) mountShm() error {
	if p.hostIPC() {
		return nil
	}
	dir := p.files().Shm
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make shm directory: %w", err)
	}
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, shmOptions); err != nil {
		return fmt.Errorf("mount shm: %w", err)
	}
	crash.Point("pod/shm-mounted")
	return nil
}

// unmountAll takes down the namespaces' pins, shm and the pod's files. Idempotent.
func (p *pod) unmountAll() error {
	return unmountPodDir(p.dir)
}

func unmountPodDir(dir string) error {
	errs := []error{unpin(filepath.Join(dir, "shm")), unpin(filepath.Join(dir, "etc"))}
	for _, kind := range []string{"net", "ipc", "uts", "pid"} {
		errs = append(errs, unpin(filepath.Join(dir, "ns", kind)))
	}
	return errors.Join(errs...)
}

// removeDir deletes a directory of the runtime directory whose mounts are gone.
func removeDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("delete state directory: %w", err)
	}
	crash.Point("pod/directory-removed")
	return nil
}

// makeLogDir makes the log directory and returns how to take it back: only where it was not there, and empty.
func makeLogDir(dir string) (undo func() error, err error) {
	nothing := func() error { return nil }
	if dir == "" {
		return nothing, nil
	}
	if _, err := os.Stat(dir); err == nil {
		return nothing, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nothing, fmt.Errorf("make log directory: %w", err)
	}
	crash.Point("pod/logs-made")
	return func() error { return remove(dir) }, nil
}
