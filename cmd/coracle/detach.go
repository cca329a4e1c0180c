package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/coracle-cri/coracle/rootless"
)

func newSession() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// withoutDetach drops --detach in its spellings: what is started is the same command in the foreground.
func withoutDetach(args []string) []string {
	var out []string
	for _, a := range args {
		if a != "--detach" && !strings.HasPrefix(a, "--detach=") {
			out = append(out, a)
		}
	}
	return out
}

// keepDescriptors keeps what this process has inherited beyond its standard streams from the node: whoever reads the
// other end of such a pipe, or waits for such a lock, would wait as long as the node lives.
func keepDescriptors() error {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("keep descriptors from the node: %w", err) // Linux 5.11 has it, and a node works without
	}
	return nil
}

// newLogFile opens an empty log and keeps the one before as .1.
func newLogFile(path string) (*os.File, error) {
	if err := os.Rename(path, path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("rotate log: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}

// lastLine is the end of a node's log, which is the error that ended it.
func lastLine(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(raw), []byte("\n"))
	return strings.TrimPrefix(string(lines[len(lines)-1]), "coracle: ")
}

// dialCRI opens a connection to the node's CRI; the first call makes it.
func dialCRI(node rootless.Node) (*grpc.ClientConn, error) {
	return grpc.NewClient(node.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
}

// awaitReady returns nil once the node answers Version.
func awaitReady(ctx context.Context, node rootless.Node) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(node.Socket()); err == nil {
			if err = askVersion(ctx, node); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func askVersion(ctx context.Context, node rootless.Node) error {
	_, err := daemonVersion(ctx, node)
	return err
}
