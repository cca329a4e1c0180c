package keeper

import (
	"log/slog"
	"testing"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

// TestAFilterThatCouldNotBeMadeIsTriedAgain by the next start, and kept once it can be.
func TestAFilterThatCouldNotBeMadeIsTriedAgain(t *testing.T) {
	k := newKeeper(Config{Log: slog.New(slog.DiscardHandler)})
	profile := &configs.Seccomp{DefaultAction: configs.Allow}
	defer k.filters.close()
	var most unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &most); err != nil {
		t.Fatal(err)
	}
	// No descriptor, no filter.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: most.Max}); err != nil {
		t.Fatal(err)
	}
	file := k.filters.use(profile)
	k.tasks.Wait()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &most); err != nil {
		t.Fatal(err)
	}
	if file != nil || k.KeptFilters() != 0 {
		t.Fatal("it was made without a descriptor")
	}
	k.filters.use(profile)
	k.tasks.Wait()
	if k.filters.use(profile) == nil {
		t.Error("it was not tried again")
	}
}
