// Command bench times what a CRI runtime does, as its clients see it.
//
//	bench -endpoint SOCKET -image IMAGE           one runtime that runs: the calls of a pod's life, in milliseconds
//	bench compare -programs bin -peer DIR ...     coracle and a peer in turn, every row (see compare.go)
//
// It knows nothing of coracle but how its node is started: any runtime's socket will do. Two more commands are its own
// helpers, which it runs in a node's network: bench listen, bench stream.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
)

func main() {
	box.Init()
	commands := map[string]func([]string) error{"compare": compareCommand, "listen": listenCommand, "stream": streamCommand}
	run, args := callsCommand, os.Args[1:]
	if len(args) > 0 && commands[args[0]] != nil {
		run, args = commands[args[0]], args[1:]
	}
	if err := run(args); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %.4000s\n", err.Error()) // fifty pods fail fifty times
		os.Exit(1)
	}
}

// callsCommand times the calls of one runtime, one pod after another.
func callsCommand(args []string) error {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	endpoint := f.String("endpoint", os.Getenv("CONTAINER_RUNTIME_ENDPOINT"), "socket of the runtime, unix://PATH (CONTAINER_RUNTIME_ENDPOINT)")
	image := f.String("image", "", "image, with a /bin/sleep and a /bin/true")
	pull := f.Bool("pull", false, "pull the image first")
	sharePID := f.Bool("share-pid", false, "one pid namespace for the pod, as shareProcessNamespace asks for")
	seccomp := f.Bool("seccomp", false, "ask for the runtime's default seccomp profile")
	count := f.Int("count", 20, "pods")
	if err := f.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	c, err := dial(*endpoint, *image, "")
	if err != nil {
		return err
	}
	defer c.close()
	if *pull {
		if err := c.pull(ctx, *image); err != nil {
			return err
		}
	}
	o := podOptions{seccomp: *seccomp, sharePID: *sharePID}
	times := map[string][]float64{}
	// The first pod warms caches of the machine's, and is not counted.
	for i := -1; i < *count; i++ {
		l, err := c.life(ctx, o)
		if err != nil {
			return fmt.Errorf("pod %d: %w", i+1, err)
		}
		for row, ms := range l {
			if i >= 0 {
				times[row] = append(times[row], ms)
			}
		}
	}
	profile := "no seccomp profile"
	if *seccomp {
		profile = "the default seccomp profile"
	}
	fmt.Printf("%d pods, one after another, %s; milliseconds\n", *count, profile)
	return printCalls(times)
}

func printCalls(times map[string][]float64) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "  "+strings.Repeat(" ", 31)+"\tmedian\tp95\tleast\t")
	for _, row := range lifeRows {
		t := times[row]
		fmt.Fprintf(w, "  %-31s\t%.1f\t%.1f\t%.1f\t\n", row, median(t), p95(t), slices.Min(t))
	}
	return w.Flush()
}
