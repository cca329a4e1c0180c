package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/rootless"
)

// version is set by the linker: -X main.version=…
var version = "0.1.0-dev"

func main() {
	if rootless.IsUnshare() {
		exit(rootless.Unshare(os.Args[1:]))
	}
	exit(newRoot().ExecuteContext(context.Background()))
}

// exit prints err as one sentence and ends the process: 0 for none, 1 for any.
func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, "coracle:", err)
	os.Exit(1)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "coracle",
		Short: "A rootless CRI runtime for development: one user, no root, real pods",
		Long: `coracle makes a node of the calling user's own: a user namespace with a user-mode network, in which a
daemon serves the Kubernetes CRI (v1) on a unix socket. Start one with "coracle up", point crictl or a kubelet at it.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	flags := newSettings(root.PersistentFlags())
	root.AddCommand(
		upCommand(flags), downCommand(flags), statusCommand(flags), enterCommand(flags), restartCommand(flags),
		doctorCommand(flags), imageCommand(flags), configCommand(), versionCommand(), daemonCommand(flags),
	)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())
	})
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of the program", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), "coracle", version) },
	}
}

func enterCommand(s *settings) *cobra.Command {
	return &cobra.Command{
		Use:   "enter [flags] -- COMMAND [ARG...]",
		Short: "Run a command inside the node's namespaces, as a kubelet would be",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			err = node.Enter(joinCgroup, args)
			if errors.Is(err, rootless.ErrDown) {
				return fmt.Errorf("node %s is not up; to start it, run: coracle up --detach%s", node.Name, nameFlag(node))
			}
			return err
		},
	}
}

// joinCgroup brings this process into the node's cgroup, for what counts there. The command does without where that is
// not to be had, as where a login session and a unit of root's have nothing in common.
func joinCgroup(path string) {
	if err := cgroupv2.Join(path); err != nil {
		slog.Debug("the command stays in the cgroup that it comes from", "err", err)
	}
}

// nameFlag is what a command line for node needs beside the command.
func nameFlag(node rootless.Node) string {
	if node.Name == rootless.DefaultName {
		return ""
	}
	return " --name " + node.Name
}
