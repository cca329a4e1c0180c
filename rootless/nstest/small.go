package nstest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Small mounts a tmpfs on dir, which is made where it is missing, until the end of the test. options bound it: "size=64k",
// "nr_inodes=20".
func Small(t testing.TB, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755,"+options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// Fill takes all the room of the filesystem that dir is on, bytes and then inodes, and returns how to give it back.
func Fill(t testing.TB, dir string) (free func()) {
	t.Helper()
	filler, err := os.MkdirTemp(dir, "filler-")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(filler, "bytes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{64 << 10, 4 << 10, 1} {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(filler, fmt.Sprint(i)), nil, 0o600)
		if i > 1<<16 {
			break // inodes are as good as without bound there
		}
	}
	return func() {
		if err := os.RemoveAll(filler); err != nil {
			t.Error(err)
		}
	}
}
