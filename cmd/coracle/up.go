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
	"os/signal"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/cmd/settle"
	"github.com/coracle-cri/coracle/cmd/threads"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/pod"
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
	all = append(all, netslirp.CheckDriver(driverConfig(c, io.Discard)), netslirp.CheckPodCIDR(c.Network.PodCIDR))
	if _, err := keeperPath(); err != nil {
		all = append(all, err)
	}
	all = append(all, checkHandlers(c.Handlers))
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

// claim makes sure that a node can run here and that nobody else runs this one.
func claim(c config, node rootless.Node) (*rootless.Lock, error) {
	if err := preflight(c); err != nil {
		return nil, err
	}
	lock, err := takeLock(node)
	if err != nil {
		return nil, explainLock(node, err)
	}
	if err := refuseLive(node); err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	return lock, nil
}

// takeLock waits for who only looks or sweeps, as `coracle down` does, or has just removed the directories.
func takeLock(node rootless.Node) (*rootless.Lock, error) {
	for deadline := time.Now().Add(sweepTimeout); ; time.Sleep(10 * time.Millisecond) {
		err := node.MakeDirs()
		if errors.Is(err, fs.ErrNotExist) && time.Now().Before(deadline) {
			continue // it went while it was made
		}
		if err != nil {
			return nil, err
		}
		lock, err := node.TryLock()
		if err == nil && lock.HoldsRuntime() {
			return lock, nil
		}
		if err == nil {
			err = errors.Join(rootless.ErrUpElsewhere, lock.Release())
		}
		if !errors.Is(err, rootless.ErrUp) || lives(node) || time.Now().After(deadline) {
			return nil, err
		}
		if err := node.Elsewhere(); err != nil {
			_ = os.Remove(node.RuntimeDir) // just made, and empty; one that is not stays
			return nil, fmt.Errorf("node %s is up already (for one beside it, choose another --name): %w", node.Name, err)
		}
	}
}

// lives tells whether somebody is the node's parent.
func lives(node rootless.Node) bool {
	record, err := node.ReadRecord()
	return err == nil && record.Alive() || node.Lives()
}

// refuseLive is for who holds the lock: a node of an earlier version, which locks its data directory alone, may live here with
// another one, and is not to be swept, whether its record can be read or not.
func refuseLive(node rootless.Node) error {
	if !lives(node) {
		return nil
	}
	return explainLock(node, rootless.ErrUpElsewhere)
}

// runNode is the parent role: it holds the node's lock, cgroup and record for as long as the node lives, and
// gives all of them back.
func runNode(c config, node rootless.Node, out io.Writer) (err error) {
	lock, err := claim(c, node)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	interrupted, release := holdSignals()
	defer release()
	err = runLocked(interrupted, c, node, out)
	if err != nil && interrupted.Err() != nil {
		if !errors.Is(err, errInterrupted) {
			err = fmt.Errorf("%w: %w", errInterrupted, err)
		}
		return err
	}
	return err
}

// runLocked takes over from a dead predecessor, finds a cgroup, and is the node's parent until the node ends.
func runLocked(interrupted context.Context, c config, node rootless.Node, out io.Writer) (err error) {
	if err := sweep(node, node.Empty); err != nil {
		return err
	}
	delegation, err := cgroupv2.Find()
	if err != nil {
		return err
	}
	if delegation, err = delegation.Obtain(node.CgroupName()); err != nil {
		return err
	}
	if err := node.MakeDirs(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, clearRuntime(node, node.Sweep)) }()

	record := rootless.Record{Program: version, Driver: c.Network.Driver,
		CgroupFound: delegation.Sentence, CgroupHint: delegation.Hint, CgroupAttempts: delegation.Attempts}
	if delegation.Path != "" {
		record.Cgroup = delegation.NodePath(node.CgroupName())
	}
	// Before there is anything to sweep: a SIGKILL may come at any time.
	if err := node.WriteRecord(record); err != nil {
		return err
	}
	if delegation.Path != "" {
		group, err := delegation.Enter(node.CgroupName())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, group.Leave()) }()
	}
	if err := node.InitRootlesskit(); err != nil {
		return err
	}
	networkDriver, portDriver, err := netslirp.ParentDriver(driverConfig(c, os.Stderr), node.RootlesskitDir())
	if err != nil {
		return err
	}
	if interrupted.Err() != nil {
		return errInterrupted
	}
	ctx, cancel := context.WithCancel(context.Background())
	announced := make(chan struct{})
	go func() {
		defer close(announced)
		announce(ctx, node, out)
	}()
	defer func() { cancel(); <-announced }()
	if err := passNohup(); err != nil {
		return err
	}
	threads.Keep(threads.Spare)
	settle.InQuiet(slog.Default())
	return node.RunParent(rootless.ParentOptions{Network: networkDriver, Ports: ownPorts{portDriver, node.PortsSocket()},
		Evacuate: delegation.Path != "", Debug: c.Log.Level == "debug"})
}

// sweep removes what an earlier life of the node left when it was killed: its cgroup, which the record names
// whoever sweeps, then the runtime directory with the record, or what is in it. The caller holds the lock.
func sweep(node rootless.Node, remove func() error) error {
	if err := refuseLive(node); err != nil {
		return err
	}
	record, err := node.ReadRecord()
	if err == nil && record.Cgroup != "" {
		err = cgroupv2.RemoveStale(cgroupv2.Delegation{Path: filepath.Dir(record.Cgroup)}, cgroupv2.NodeName(record.Cgroup))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		slog.Warn("the cgroup of the node's earlier life is looked for where it would be now", "node", node.Name, "err", err)
		var delegation cgroupv2.Delegation
		if delegation, err = cgroupv2.Find(); err == nil && delegation.Path != "" {
			err = cgroupv2.RemoveStale(delegation, node.CgroupName())
		}
	}
	if err != nil {
		slog.Warn("a dead node's cgroup may be left", "node", node.Name, "err", err)
	}
	return clearRuntime(node, remove)
}

// clearRuntime removes the runtime directory of a node that is dead, or what is in it, and keeps what the keeper has recorded
// of containers: the daemon may have died before it could.
func clearRuntime(node rootless.Node, remove func() error) error {
	if err := pod.SaveHistory(node.RuntimeDir, node.DataDir, slog.Default()); err != nil {
		slog.Warn("exit codes of containers may be lost", "node", node.Name, "err", err)
	}
	return remove()
}

func explainLock(node rootless.Node, err error) error {
	if !errors.Is(err, rootless.ErrUp) {
		return err
	}
	elsewhere := errors.Is(err, rootless.ErrUpElsewhere)
	switch living := lives(node); {
	case !living && elsewhere:
		return fmt.Errorf("another process has the runtime directory of node %s (%s): it is just starting or ending there", node.Name, node.RuntimeDir)
	case !living:
		return fmt.Errorf("another process holds node %s (%s) and is not in %s: it is just starting or ending, or was started with another XDG_RUNTIME_DIR; set that as it was then, or choose another --name",
			node.Name, node.DataDir, node.RuntimeDir)
	}
	text := fmt.Sprintf("node %s is up already; to use it, run: export CONTAINER_RUNTIME_ENDPOINT=%s; to stop it, run: coracle down%s",
		node.Name, node.Endpoint(), nameFlag(node))
	if elsewhere {
		text += "; it was started with another XDG_DATA_HOME than yours, so that its images are not in " + node.DataDir
	}
	return errors.New(text)
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
	// The log is the lock holder's: another start must not move it away.
	lock, err := claim(c, node)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Release() }() // released below already, where all went well
	log, err := newLogFile(node.LogFile())
	if err != nil {
		return err
	}
	defer log.Close()
	if err := keepDescriptors(); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", withoutDetach(os.Args[1:])...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = newSession()
	lock.HandOver(cmd)
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	if err := lock.Release(); err != nil {
		return fmt.Errorf("hand the lock over: %w", err)
	}
	if err := awaitDetached(node, cmd); err != nil {
		return err
	}
	printReady(node, time.Since(began), out)
	return nil
}

// awaitDetached waits until the started node answers. One that does not in time, or whose user gives up with
// Ctrl-C, is ended: nobody would look after it.
func awaitDetached(node rootless.Node, cmd *exec.Cmd) error {
	interrupted, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(interrupted, readyTimeout)
	defer cancel()
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended); cancel() }() // its error is in the log
	err := awaitReady(ctx, node)
	if err == nil {
		return nil
	}
	select {
	case <-ended:
		return fmt.Errorf("the node ended before it was ready: %s (log: %s)", lastLine(node.LogFile()), node.LogFile())
	default:
	}
	_ = cmd.Process.Signal(unix.SIGTERM) // it may end at this very moment
	select {
	case <-ended:
	case <-time.After(endTimeout):
		_ = cmd.Process.Kill()
	}
	if interrupted.Err() != nil {
		return errInterrupted
	}
	return fmt.Errorf("the node did not answer within %s and is stopped: %w (log: %s)", readyTimeout, err, node.LogFile())
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
	if os.Getenv(nohupEnv) != "" {
		command = append(command, "--ignore-hangup")
	}
	command = append(command, "--", self, "daemon")
	command = append(command, s.args(c)...)
	threads.Keep(threads.Spare)
	settle.InQuiet(slog.Default())
	return rootless.RunChild(rootless.ChildOptions{Network: networkDriver, Ports: portDriver, CopyUp: c.CopyUp,
		Command: command, Debug: c.Log.Level == "debug"})
}
