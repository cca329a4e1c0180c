package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// errInterrupted ends a start that the user or `coracle down` has cut off.
var errInterrupted = errors.New("the start of the node was interrupted by a signal")

// resendAfter is how long a signal gets to have its effect.
const resendAfter = 500 * time.Millisecond

// nohupEnv tells the child that the user has started the node with nohup(1). RootlessKit catches every signal, so that
// an ignored one would be passed on to the node all the same.
const nohupEnv = "_CORACLE_NOHUP"

func passNohup() error {
	if !signal.Ignored(unix.SIGHUP) {
		return nil
	}
	return os.Setenv(nohupEnv, "1")
}

// holdSignals keeps a signal to end from ending this process before it has given everything back. Where the node runs
// RootlessKit passes the signal to its PID 1, and the kernel drops what a PID 1 has no handler for yet
// (pid_namespaces(7)): so it is sent again, to this very process, until release. Caught it stays after that too: all that
// is left to this process is to end, with its own exit code. The context ends with the first.
func holdSignals() (interrupted context.Context, release func()) {
	ctx, cancel := context.WithCancel(context.Background())
	came := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(sig) { // nohup(1)
			signal.Notify(came, sig)
		}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-quit:
			return
		case <-came:
		}
		cancel()
		tick := time.NewTicker(resendAfter)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				_ = unix.Kill(os.Getpid(), unix.SIGTERM) // this process: it exists
			}
		}
	}()
	return ctx, func() { close(quit); <-done; cancel() }
}
