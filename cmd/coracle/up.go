package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/rootless"
)

// readyTimeout bounds the wait for a node that neither answers nor ends.
const readyTimeout = 30 * time.Second

func upCommand(s *settings) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the node, in the foreground unless --detach is given",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			switch {
			case rootless.IsChild():
				return runChild(s, c, node)
			case detach:
				return startDetached(c, node, cmd.OutOrStdout())
			default:
				return runNode(c, node, cmd.OutOrStdout())
			}
		},
	}
	cmd.Flags().BoolVar(&detach, "detach", false, "return when the node is ready; its log goes to a file")
	return cmd
}

func driverConfig(c config, log io.Writer) netslirp.DriverConfig {
	return netslirp.DriverConfig{Name: c.Network.Driver, MTU: c.Network.MTU, Binary: c.Network.Program,
		DisableHostLoopback: !c.Network.HostLoopback, Log: log}
}

// preflight returns all that forbids a node here, a line each.
func preflight(c config) error {
	var all []error
	for _, p := range rootless.Preflight() {
		all = append(all, p)
	}
	all = append(all, netslirp.CheckDriver(driverConfig(c, io.Discard)))
	if _, err := keeperPath(); err != nil {
		all = append(all, err)
	}
	return errors.Join(all...)
}

// keeperPath finds coracle-keeper: beside this program, else in PATH.
func keeperPath() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	beside := filepath.Join(filepath.Dir(self), "coracle-keeper")
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	path, err := exec.LookPath("coracle-keeper")
	if err != nil {
		return "", fmt.Errorf("coracle-keeper is neither beside %s nor in PATH; install both programs into one directory, with: make install", self)
	}
	return path, nil
}

// runNode is the parent role: it holds the node's lock, cgroup and record for as long as the node lives, and
// gives all of them back.
func runNode(c config, node rootless.Node, out io.Writer) (err error) {
	if err := preflight(c); err != nil {
		return err
	}
	if err := node.MakeDirs(); err != nil {
		return err
	}
	lock, err := node.TryLock()
	if err != nil {
		return explainLock(node, err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if err := sweep(node); err != nil {
		return err
	}
	delegation, err := cgroupv2.Find()
	if err != nil {
		return err
	}
	if err := node.MakeDirs(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Sweep()) }()

	record := rootless.Record{Program: version, Driver: c.Network.Driver, CgroupFound: delegation.Sentence, CgroupHint: delegation.Hint}
	if delegation.Path != "" {
		group, err := delegation.Enter(node.Name)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, group.Leave()) }()
		record.Cgroup = group.Path()
	}
	if err := node.InitRootlesskit(); err != nil {
		return err
	}
	networkDriver, portDriver, err := netslirp.ParentDriver(driverConfig(c, os.Stderr), node.RootlesskitDir())
	if err != nil {
		return err
	}
	if err := node.WriteRecord(record); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	announced := make(chan struct{})
	go func() {
		defer close(announced)
		announce(ctx, node, out)
	}()
	defer func() { cancel(); <-announced }()
	return node.RunParent(rootless.ParentOptions{Network: networkDriver, Ports: portDriver,
		Evacuate: delegation.Path != "", Debug: c.Log.Level == "debug"})
}

// sweep removes what an earlier life of the node left when it was killed: its cgroup, which the record names
// whoever sweeps, then the runtime directory with the record. The caller holds the lock.
func sweep(node rootless.Node) error {
	record, err := node.ReadRecord()
	if err == nil && record.Cgroup != "" {
		err = cgroupv2.RemoveStale(cgroupv2.Delegation{Path: filepath.Dir(record.Cgroup)}, node.Name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		slog.Warn("a dead node's cgroup may be left", "node", node.Name, "err", err)
	}
	return node.Sweep()
}

func explainLock(node rootless.Node, err error) error {
	if errors.Is(err, rootless.ErrUp) {
		return fmt.Errorf("node %s is up already; to use it, run: export CONTAINER_RUNTIME_ENDPOINT=%s; to stop it, run: coracle down%s",
			node.Name, node.Endpoint(), nameFlag(node))
	}
	return err
}

// announce tells the user that the CRI answers.
func announce(ctx context.Context, node rootless.Node, out io.Writer) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	began := time.Now()
	if err := awaitReady(ctx, node); err != nil {
		if ctx.Err() == context.DeadlineExceeded {
			slog.Error("node does not answer", "after", readyTimeout, "socket", node.Socket(), "err", err)
		}
		return
	}
	printReady(node, time.Since(began), out)
}

func printReady(node rootless.Node, took time.Duration, out io.Writer) {
	fmt.Fprintf(out, "node %s is ready after %d ms; to use it, run:\n\n  export CONTAINER_RUNTIME_ENDPOINT=%s\n\n",
		node.Name, took.Milliseconds(), node.Endpoint())
}

// startDetached runs `coracle up` again in a session of its own and waits until the node answers or ends.
func startDetached(c config, node rootless.Node, out io.Writer) error {
	if err := preflight(c); err != nil {
		return err
	}
	if err := node.MakeDirs(); err != nil {
		return err
	}
	if record, err := node.ReadRecord(); err == nil && record.Alive() {
		return explainLock(node, rootless.ErrUp)
	}
	log, err := newLogFile(node.LogFile())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", withoutDetach(os.Args[1:])...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = newSession()
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait(); cancel() }()
	if err := awaitReady(ctx, node); err != nil {
		select {
		case <-ended:
			return fmt.Errorf("the node ended before it was ready: %s (log: %s)", lastLine(node.LogFile()), node.LogFile())
		default:
			return fmt.Errorf("the node does not answer within %s: %w (log: %s)", readyTimeout, err, node.LogFile())
		}
	}
	printReady(node, time.Since(began), out)
	return nil
}

// runChild is PID 1 of the node. Its command is the keeper, whose command is the daemon.
func runChild(s *settings, c config, node rootless.Node) error {
	keeper, err := keeperPath()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	record, err := node.ReadRecord()
	if err != nil {
		return err
	}
	networkDriver, portDriver, err := netslirp.ChildDriver(c.Network.Driver, os.Stderr)
	if err != nil {
		return err
	}
	command := []string{keeper, "--runtime-dir", node.RuntimeDir}
	if record.Cgroup != "" {
		command = append(command, "--cgroup-mount")
	}
	command = append(command, "--", self, "daemon")
	command = append(command, s.args(c)...)
	return rootless.RunChild(rootless.ChildOptions{Network: networkDriver, Ports: portDriver, CopyUp: c.CopyUp,
		Command: command, Debug: c.Log.Level == "debug"})
}
