package main

import (
	"os"
	"os/signal"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestASignalIsHeldAndSentAgainUntilRelease(t *testing.T) {
	interrupted, release := holdSignals()
	defer signal.Reset(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	// Stands for RootlessKit, which catches every signal, too, and passes it on.
	passed := make(chan os.Signal, 8)
	signal.Notify(passed, unix.SIGTERM)
	defer signal.Stop(passed)
	if interrupted.Err() != nil {
		t.Fatal("interrupted before any signal")
	}
	if err := unix.Kill(os.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		select {
		case <-passed:
		case <-time.After(10 * resendAfter):
			t.Fatalf("signal %d did not come", n+1)
		}
	}
	if interrupted.Err() == nil {
		t.Error("the start is not told of the signal")
	}
	release()
	for len(passed) > 0 {
		<-passed
	}
	select {
	case <-passed:
		t.Error("a signal is sent after release")
	case <-time.After(2 * resendAfter):
	}
}

func TestADetachedNodeGetsNoForeignDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	inherited, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD, 3) // as a shell leaves them: not close-on-exec
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(inherited)
	if err := keepDescriptors(); err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(inherited), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: the node would hold the pipe open", flags, err)
	}
}
