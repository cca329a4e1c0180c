package main

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memory are what processes share beside files: keyrings and System V's segments.
func memory() []attempt {
	return []attempt{
		{"key of the host's user", hostKey},
		{"write session keyring", func() (string, error) {
			_, err := unix.AddKey("user", "hostile", []byte("x"), unix.KEY_SPEC_SESSION_KEYRING)
			return "", err
		}},
		{"write user keyring", func() (string, error) {
			id, err := unix.AddKey("user", "hostile", []byte("x"), unix.KEY_SPEC_USER_KEYRING)
			if err == nil {
				_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
			}
			return "", err
		}},
		{"shared memory of the host", hostMemory},
	}
}

func hostKey() (string, error) {
	name, err := given(keyEnv)
	if err != nil {
		return "", err
	}
	for _, ring := range []int{unix.KEY_SPEC_USER_KEYRING, unix.KEY_SPEC_SESSION_KEYRING, unix.KEY_SPEC_USER_SESSION_KEYRING} {
		if _, err = unix.KeyctlSearch(ring, "user", name, 0); err == nil {
			return "found", nil
		}
	}
	return "", err
}

// hostMemory looks for the segment by its number and its creator's mark, its size.
func hostMemory() (string, error) {
	want, err := given(shmEnv)
	if err != nil {
		return "", err
	}
	id, size, _ := strings.Cut(want, " ")
	raw, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == id && f[3] == size {
			number, err := strconv.Atoi(id)
			if err != nil {
				return "", err
			}
			_, err = unix.SysvShmAttach(number, 0, unix.SHM_RDONLY)
			return "attached", err
		}
	}
	return "", errAbsent
}
