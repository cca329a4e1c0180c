//go:build cgo && seccomp

package filters

// #cgo pkg-config: libseccomp
// #cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_release -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_arch_remove
// #cgo LDFLAGS: -Wl,--wrap=seccomp_attr_set -Wl,--wrap=seccomp_rule_add_array -Wl,--wrap=seccomp_rule_add_exact_array
// #cgo LDFLAGS: -Wl,--wrap=seccomp_syscall_priority -Wl,--wrap=seccomp_merge -Wl,--wrap=seccomp_reset -Wl,--wrap=seccomp_load
// #cgo LDFLAGS: -Wl,--wrap=seccomp_export_bpf -Wl,--wrap=seccomp_export_pfc
// #include "wrap.h"
import "C"

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Fd is the descriptor at which a container's init is given a kept filter: the first after its standard streams.
const Fd = 3

// New makes the file in which a filter is to be kept, for Record. Seal it then.
func New() (*os.File, error) {
	fd, err := unix.MemfdCreate("seccomp", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memfd: %w", err)
	}
	return os.NewFile(uintptr(fd), "seccomp"), nil
}

// Seal makes sure that the filter never changes again, and that there is one.
func Seal(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return errors.New("no filter was made")
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { _, serr = unix.FcntlInt(fd, unix.F_ADD_SEALS, seals) }); err != nil {
		return err
	}
	if serr != nil {
		return fmt.Errorf("seal filter: %w", serr)
	}
	return nil
}

// Use is for the init of a container, before libcontainer's: it takes the kept filter at Fd, if there is one. What is at
// Fd otherwise, a socket of libcontainer's, is no sealed memfd.
//
// The descriptor stays open until execve(2) closes it: libcontainer takes everything up to it for the container's, and
// would leave another one that came to have its number to the program.
func Use() {
	got, err := unix.FcntlInt(Fd, unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return
	}
	unix.CloseOnExec(Fd)
	var stat unix.Stat_t
	if err := unix.Fstat(Fd, &stat); err != nil || stat.Size <= 0 {
		return
	}
	data, err := unix.Mmap(Fd, 0, int(stat.Size), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return // compiled as ever
	}
	C.coracle_use(unsafe.Pointer(&data[0]), C.size_t(len(data)))
}

// Record reads a profile as libcontainer has it and keeps its filter in the file at Fd. libcontainer's own code makes it,
// up to where it would load it. There the process ends: this returns with an error or not at all.
func Record(profile io.Reader) error {
	var config configs.Seccomp
	if err := json.NewDecoder(profile).Decode(&config); err != nil {
		return fmt.Errorf("decode seccomp profile: %w", err)
	}
	C.coracle_record(Fd)
	if _, err := seccomp.InitSeccomp(&config); err != nil {
		return err
	}
	return errors.New("the filter was not recorded")
}
