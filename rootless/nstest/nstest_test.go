package nstest_test

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func TestTheTestsRunAsRootOfTheirOwnNamespaces(t *testing.T) {
	if !nstest.InNamespace() || os.Geteuid() != 0 || os.Getpid() != 1 {
		t.Fatalf("in namespace %v, uid %d, pid %d", nstest.InNamespace(), os.Geteuid(), os.Getpid())
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	ifs, err := net.Interfaces()
	if err != nil || len(ifs) != 1 || ifs[0].Name != "lo" {
		t.Fatalf("interfaces %v, %v; want only lo", ifs, err)
	}
}

func TestSubordinateIDsAreMapped(t *testing.T) {
	if nstest.IDs() == 1 {
		t.Skip("this user has no subordinate ids: newuidmap or /etc/subuid is missing")
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, 1000, 65534); err != nil {
		t.Fatalf("chown to a subordinate id: %v", err)
	}
}
