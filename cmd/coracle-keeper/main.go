package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/cmd/settle"
	"github.com/coracle-cri/coracle/cmd/threads"
	"github.com/coracle-cri/coracle/ctr/keeper"
)

// version is set by the linker.
var version = "dev"

// init comes before main's flags: as a container's init this program has the argument "init" and no others.
func init() { keeper.Init() }

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "coracle-keeper:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("coracle-keeper", flag.ContinueOnError)
	dir := flags.String("runtime-dir", "", "directory of the keeper's socket and records; it must exist")
	mountCgroup := flags.Bool("cgroup-mount", false, "mount the node's cgroup2 tree on /sys/fs/cgroup")
	ignoreHangup := flags.Bool("ignore-hangup", false, "go on after SIGHUP; otherwise it ends the node as SIGTERM does")
	verbose := flags.Bool("debug", false, "log more")
	checkHandover := flags.Bool(keeper.CheckHandoverFlag, false, "tell whether this program can go on with the state on its standard input, and exit")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *showVersion {
		fmt.Println(version)
		return nil
	}
	if *checkHandover {
		return keeper.CheckHandover(os.Stdin)
	}
	if *dir == "" {
		return fmt.Errorf("--runtime-dir is missing")
	}
	handover, err := received()
	if err != nil {
		return err
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("program", "keeper")

	ends := []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	if *ignoreHangup {
		// Caught and dropped: an ignored signal would stay ignored in every container, across execve(2).
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	} else {
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	defer stop()
	// Caught to the very end: the parent sends a signal again until the node has ended, and one that came after stop would
	// kill this process, as if it had failed.
	signal.Notify(make(chan os.Signal, 1), ends...)
	k, err := open(keeper.Config{RuntimeDir: *dir, Version: version, Daemon: flags.Args(), Log: log, Handover: handover}, *mountCgroup)
	if err != nil && handover != nil {
		return handover.GoBack(err)
	}
	if err != nil {
		return err
	}
	threads.Keep(threads.Spare)
	settle.InQuiet(log)
	return k.Run(ctx)
}

// open makes the process fit to keep containers, and the keeper.
func open(cfg keeper.Config, mountCgroup bool) (*keeper.Keeper, error) {
	if err := keeper.Prepare(cfg.Log); err != nil {
		return nil, err
	}
	if mountCgroup && cfg.Handover == nil {
		if err := cgroupv2.MountInside(); err != nil {
			return nil, err
		}
	}
	return keeper.Open(cfg)
}

// received returns what the program left that ran in this process before; nil for a keeper that begins, which first of all
// leaves the user's keys behind.
func received() (*keeper.Handover, error) {
	handover, err := keeper.Received()
	if err != nil || handover != nil {
		return handover, err
	}
	return nil, keeper.LeaveKeyring()
}
