package nstest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// UserQuota are options of Small: the room is what the user's quota on QuotaDir leaves.
const UserQuota = "quota"

// Small mounts a tmpfs on dir, which is made where it is missing, until the end of the test. options bound it: "size=64k",
// "nr_inodes=20".
func Small(t testing.TB, dir, options string) {
	t.Helper()
	from, kind, flags, data := "tmpfs", "tmpfs", uintptr(0), "mode=0755,"+options
	if options == UserQuota {
		from, kind, flags, data = quotaDir(t), "", unix.MS_BIND, ""
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(from, dir, kind, flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// quotaDir makes a directory below QuotaDir.
func quotaDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(QuotaDir(t), "")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		Settle(t, filepath.Dir(dir))
	})
	return dir
}

// Settle waits until what was removed below dir counts no more: btrfs gives a quota back with its next transaction.
func Settle(t testing.TB, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Syncfs(int(f.Fd())), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// QuotaDir is a directory of the caller's on a filesystem where it has a quota of 32 MiB, for the tests of this package
// alone: scripts/as-user.sh makes it, as root, where it can. Without it the test is skipped.
func QuotaDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("CORACLE_E2E_QUOTA")
	if dir == "" {
		t.Skip("no directory with a quota (CORACLE_E2E_QUOTA): scripts/as-user.sh makes one where it runs as root, may mount, and the kernel has btrfs")
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, filepath.Base(here))
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
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
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
