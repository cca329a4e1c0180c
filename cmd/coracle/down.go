package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/rootless"
)

// endTimeout bounds the wait for a node's parent after SIGTERM, and again after SIGKILL.
const endTimeout = 15 * time.Second

// sweepTimeout bounds the wait for another process that sweeps.
const sweepTimeout = 2 * time.Second

func downCommand(s *settings) *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the node and every pod on it; images stay",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			return runDown(cmd.Context(), node, grace, cmd.OutOrStdout())
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", 10*time.Second, "how long containers get to end by themselves after their stop signal")
	return cmd
}

func runDown(ctx context.Context, node rootless.Node, grace time.Duration, out io.Writer) error {
	if !node.Known() { // a misspelt name, most likely: nothing is made for it
		fmt.Fprintf(out, "node %s is not up, and never was\n", node.Name)
		return nil
	}
	record, err := settledRecord(node)
	if errors.Is(err, rootless.ErrElsewhere) { // its containers would be killed without their stop signal
		return fmt.Errorf("end node %s: %w", node.Name, err)
	}
	wasUp := err == nil && record.Alive()
	if wasUp {
		stopContainers(ctx, node, grace)
		if err := endProcess(record); err != nil {
			return err
		}
	}
	swept, err := sweepDown(node)
	if err != nil {
		return err
	}
	switch {
	case wasUp:
		fmt.Fprintf(out, "node %s is down\n", node.Name)
	case swept:
		fmt.Fprintf(out, "node %s was not up; what it had left behind is removed\n", node.Name)
	default:
		fmt.Fprintf(out, "node %s is not up\n", node.Name)
	}
	return nil
}

// settledRecord reads the node's record. A parent that has the lock and is about to write its record, or to remove it,
// is waited for: this command means the node that is just starting too.
func settledRecord(node rootless.Node) (rootless.Record, error) {
	for deadline := time.Now().Add(endTimeout); ; time.Sleep(10 * time.Millisecond) {
		record, err := node.ReadRecord()
		if err == nil && record.Alive() {
			return record, err
		}
		if time.Now().After(deadline) {
			return node.Find()
		}
		if err := node.MakeDataDir(); err != nil {
			return record, err
		}
		lock, lockErr := node.TryLock()
		if lockErr == nil {
			if lockErr = lock.Release(); node.Lives() { // with another data directory, and a record that cannot be read
				return node.Find()
			}
			return record, errors.Join(err, lockErr)
		}
		if !errors.Is(lockErr, rootless.ErrUp) {
			return record, lockErr
		}
		if err != nil && (!errors.Is(err, fs.ErrNotExist) || node.Lives()) {
			return node.Find() // it is not just being written: that is done at once, and before RootlessKit starts
		}
		if elsewhere := node.Elsewhere(); elsewhere != nil {
			return record, elsewhere // it is written, but not here
		}
	}
}

// sweepDown removes what a node that was killed has left.
func sweepDown(node rootless.Node) (swept bool, err error) {
	if err := node.MakeDataDir(); err != nil {
		return false, err
	}
	lock, err := node.TryLock()
	// Another `coracle down` may be sweeping at this moment.
	for deadline := time.Now().Add(sweepTimeout); errors.Is(err, rootless.ErrUp) && time.Now().Before(deadline); lock, err = node.TryLock() {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return false, explainLock(node, err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if !lock.HoldsRuntime() {
		return false, nil // there is nothing, or what another process has just made
	}
	_, recordErr := node.ReadRecord()
	return recordErr == nil, sweep(node, node.Sweep)
}

// stopContainers gives every running container its stop signal and the grace period, all at once. It is a
// courtesy: a daemon that does not answer is no reason to keep the node up, so errors are dropped here and what
// still runs is killed with the node.
func stopContainers(ctx context.Context, node rootless.Node, grace time.Duration) {
	if grace <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, grace+5*time.Second)
	defer cancel()
	conn, err := dialCRI(node)
	if err != nil {
		return
	}
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	list, err := client.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}})
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	for _, c := range list.Containers {
		wg.Go(func() {
			_, _ = client.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.Id, Timeout: int64(grace.Round(time.Second).Seconds())})
		})
	}
	wg.Wait()
}

// endProcess ends the node's parent by pidfd, so that a pid which was reused meanwhile is never hit.
func endProcess(record rootless.Record) error {
	fd, err := unix.PidfdOpen(record.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", record.PID, err)
	}
	defer unix.Close(fd)
	if !record.Alive() {
		return nil
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
			if errors.Is(err, unix.ESRCH) {
				return nil
			}
			return fmt.Errorf("signal process %d: %w", record.PID, err)
		}
		if ended(fd, endTimeout) {
			return nil
		}
	}
	return fmt.Errorf("process %d, the node's parent, does not end; see: ps -o pid,stat,wchan,args -p %d", record.PID, record.PID)
}

// ended waits until the process of pidfd has ended: the descriptor is readable then (pidfd_open(2)).
func ended(pidfd int, within time.Duration) bool {
	deadline := time.Now().Add(within)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return false
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}
