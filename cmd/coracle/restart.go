package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/rootless"
)

// restartTimeout bounds the whole: the trial of the new program, the end of the old one, and the start of either.
const restartTimeout = 2 * time.Minute

func restartCommand(s *settings) *cobra.Command {
	var theKeeper bool
	cmd := &cobra.Command{
		Use:   "restart",
		Short: "Put this program in the place of the node's daemon; pods go on",
		Long: `restart ends the node's daemon and starts this program as the daemon, as after an update: with the flags that
the node was started with, and the configuration file as it is now. With --keeper the keeper executes the
coracle-keeper that lies beside this program. Containers, their logs and their exit codes are kept either way. Where
the new program does not come to serve, the one of before goes on, or is started again, and the error says why.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			record, err := node.Find()
			if errors.Is(err, fs.ErrNotExist) || err == nil && !record.Alive() {
				return fmt.Errorf("node %s is not up; to start it, run: coracle up --detach%s", node.Name, nameFlag(node))
			}
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), restartTimeout)
			defer cancel()
			if theKeeper {
				return replaceKeeper(ctx, node, cmd.OutOrStdout())
			}
			return restartDaemon(ctx, node, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&theKeeper, "keeper", false, "the keeper, in place of the daemon")
	return cmd
}

func restartDaemon(ctx context.Context, node rootless.Node, out io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	before, err := daemonVersion(ctx, node)
	if err != nil {
		before = "one that did not answer"
	}
	began := time.Now()
	if err := ctr.NewClient(node.KeeperSocket()).RestartDaemon(ctx, self); err != nil {
		return fmt.Errorf("%w (log: %s)", err, node.LogFile())
	}
	took := time.Since(began)
	now, err := daemonVersion(ctx, node)
	if err != nil {
		return fmt.Errorf("ask the new daemon: %w", err)
	}
	fmt.Fprintf(out, "daemon %s in place of %s, after %d ms; pods went on\n", now, before, took.Milliseconds())
	return nil
}

func replaceKeeper(ctx context.Context, node rootless.Node, out io.Writer) error {
	path, err := keeperPath()
	if err != nil {
		return err
	}
	client := ctr.NewClient(node.KeeperSocket())
	before, err := client.Info(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	now, err := client.ReplaceKeeper(ctx, path)
	if err != nil {
		return fmt.Errorf("%w (log: %s)", err, node.LogFile())
	}
	fmt.Fprintf(out, "keeper %s in place of %s, after %d ms; pods went on\n", now.Version, before.Version, time.Since(began).Milliseconds())
	return nil
}

// daemonVersion is what the daemon says of itself.
func daemonVersion(ctx context.Context, node rootless.Node) (string, error) {
	conn, err := dialCRI(node)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	v, err := runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", err
	}
	return v.RuntimeVersion, nil
}
