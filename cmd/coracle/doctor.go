package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/rootless"
)

func doctorCommand(s *settings) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Check this host for what a node needs, without starting one",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.resolve(cmd.Flags())
			if err != nil {
				return err
			}
			return runDoctor(cmd.Context(), c, cmd.OutOrStdout())
		},
	}
}

// runDoctor prints a line a check; its error says how many forbid a node.
func runDoctor(ctx context.Context, c config, out io.Writer) error {
	bad := 0
	report := func(what string, err error) {
		var p *rootless.Problem
		switch {
		case err == nil:
			fmt.Fprintf(out, "ok    %s\n", what)
			return
		case errors.As(err, &p):
			fmt.Fprintf(out, "FAIL  %s: %s\n      run: %s\n", p.Check, p.Cause, p.Fix)
		default:
			fmt.Fprintf(out, "FAIL  %s: %v\n", what, err)
		}
		bad++
	}
	_, err := rootless.NewNode(c.Name, os.Getenv)
	report("runtime and data directories", err)
	problems := rootless.Preflight()
	for _, p := range problems {
		report(p.Check, p)
	}
	if len(problems) == 0 {
		report("user, user namespaces, id map helpers, subordinate ids", nil)
	}
	report("network driver "+c.Network.Driver, netslirp.CheckDriver(driverConfig(c, io.Discard)))
	report("pod CIDR "+c.Network.PodCIDR, netslirp.CheckPodCIDR(c.Network.PodCIDR))
	hidden, err := netslirp.HiddenFromPods(c.Network.PodCIDR)
	if err != nil {
		fmt.Fprintf(out, "note  whether the pod CIDR overlaps networks of this host cannot be told: %v\n", err)
	}
	if len(hidden) > 0 { // a node starts all the same
		fmt.Fprintf(out, "note  pods do not reach %s of this host, which the pod CIDR overlaps\n"+
			"      if they should, choose another for them, as with: --pod-cidr 10.89.0.0/16\n", strings.Join(hidden, ", "))
	}
	if !c.Network.HostLoopback { // a node starts with this, too
		noteTAPFilter(out)
	}
	_, err = keeperPath()
	report("coracle-keeper", err)
	for _, name := range slices.Sorted(maps.Keys(c.Handlers)) {
		path, facts, err := askHandler(ctx, c.Handlers[name])
		report(fmt.Sprintf("runtime handler %s: %s, %s", name, path, facts.Version), err)
	}
	delegation, err := cgroupv2.Find()
	switch {
	case err != nil:
		report("cgroup", err)
	case delegation.Hint == "":
		report("cgroup: "+delegation.Sentence, nil)
	default: // a node starts all the same, with less
		fmt.Fprintf(out, "note  cgroup: %s\n      %s\n", delegation.Sentence, delegation.Hint)
		for i, attempt := range delegation.Attempts {
			fmt.Fprintf(out, "      tried %d: %s\n", i+1, attempt)
		}
	}
	if bad > 0 {
		return fmt.Errorf("a node cannot start here; failed checks: %d", bad)
	}
	return nil
}

// noteTAPFilter says where pods reach what they should not.
func noteTAPFilter(out io.Writer) {
	err := netslirp.CheckTAPFilter()
	if errors.Is(err, netslirp.ErrKept) {
		fmt.Fprintf(out, "note  pods in the node's network (hostNetwork) can reach this host's 127.0.0.1: %v\n", err)
	} else if err != nil {
		fmt.Fprintf(out, "note  whether pods in the node's network (hostNetwork) can reach this host's 127.0.0.1 cannot be told: %v\n", err)
	}
}
