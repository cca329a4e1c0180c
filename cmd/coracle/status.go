package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/rootless"
)

// statusTimeout bounds each question to the daemon.
const statusTimeout = 5 * time.Second

func statusCommand(s *settings) *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell whether the node is up, and what this host gives it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), statusTimeout)
			defer cancel()
			return printStatus(ctx, node, verbose, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "print the daemon's own account too")
	return cmd
}

func printStatus(ctx context.Context, node rootless.Node, verbose bool, out io.Writer) error {
	record, err := node.Find()
	if errors.Is(err, fs.ErrNotExist) || err == nil && !record.Alive() {
		return fmt.Errorf("node %s is not up; to start it, run: coracle up --detach%s", node.Name, nameFlag(node))
	}
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "node\t%s, up since %s, coracle %s, pid %d\n", node.Name, record.Started.Format(time.RFC3339), record.Program, record.PID)
	fmt.Fprintf(w, "endpoint\t%s\n", node.Endpoint())
	fmt.Fprintf(w, "directories\t%s (while it is up), %s (images, log)\n", node.RuntimeDir, node.DataDir)
	fmt.Fprintf(w, "network\t%s\n", record.Driver)
	fmt.Fprintf(w, "cgroup\t%s\n", record.CgroupFound)
	if record.CgroupHint != "" {
		fmt.Fprintf(w, "\t%s\n", record.CgroupHint)
	}
	if verbose {
		for i, attempt := range record.CgroupAttempts {
			fmt.Fprintf(w, "cgroup, tried %d\t%s\n", i+1, attempt)
		}
	}
	if err := printDaemon(ctx, node, verbose, w); err != nil {
		return errors.Join(w.Flush(), fmt.Errorf("the daemon does not answer (the keeper restarts it): %w", err))
	}
	return w.Flush()
}

func printDaemon(ctx context.Context, node rootless.Node, verbose bool, w io.Writer) error {
	conn, err := dialCRI(node)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	status, err := client.Status(ctx, &runtimeapi.StatusRequest{Verbose: verbose})
	if err != nil {
		return err
	}
	v, err := client.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return err
	}
	keeper, err := ctr.NewClient(node.KeeperSocket()).Info(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "programs\tdaemon %s, keeper %s\n", v.RuntimeVersion, keeper.Version)
	for _, c := range status.Status.Conditions {
		word := "no"
		if c.Status {
			word = "yes"
		}
		if c.Message != "" {
			word += ": " + c.Message
		}
		fmt.Fprintf(w, "%s\t%s\n", c.Type, word)
	}
	var handlers []string
	for _, h := range status.RuntimeHandlers {
		handlers = append(handlers, cmp.Or(h.Name, "(default)"))
	}
	fmt.Fprintf(w, "handlers\t%s\n", strings.Join(handlers, ", "))
	pods, err := client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	containers, err := client.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	running := 0
	for _, c := range containers.Containers {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			running++
		}
	}
	fmt.Fprintf(w, "pods\t%d, with %d containers, of which %d run\n", len(pods.Items), len(containers.Containers), running)
	for _, key := range slices.Sorted(maps.Keys(status.Info)) {
		fmt.Fprintf(w, "%s\t%s\n", key, status.Info[key])
	}
	return nil
}
