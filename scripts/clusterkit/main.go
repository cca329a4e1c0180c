package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/coracle-cri/coracle/e2e/box"
)

// commands take their own arguments.
var commands = map[string]func(ctx context.Context, args []string) error{
	"pki":       runPKI,
	"publish":   runPublish,
	"nodeports": runNodePorts,
	"image":     runImage,
	"remove":    runRemove,
}

func main() {
	box.Init() // remove executes this program again inside namespaces
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: clusterkit pki|publish|nodeports|image|remove [FLAG...]; scripts/cluster calls it")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := commands[os.Args[1]](ctx, os.Args[2:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "clusterkit %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

func runRemove(_ context.Context, args []string) error {
	for _, dir := range args {
		if err := box.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}
