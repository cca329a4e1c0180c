package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/cmd/settle"
	"github.com/coracle-cri/coracle/cmd/threads"
	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/pod"
	"github.com/coracle-cri/coracle/rootless"
)

// gcPercent saves a part of the CPU time of many pods' start, of which garbage collection by Go's default was 2 to 3%. A daemon at rest
// gives the larger heap back (cmd/settle).
const gcPercent = 200

// drainTimeout bounds the wait for calls in progress when the daemon ends.
const drainTimeout = 3 * time.Second

// daemonCommand is what the keeper starts inside the node.
func daemonCommand(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "daemon", Short: "Serve the CRI inside the node (started by coracle-keeper)", Args: cobra.NoArgs, Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ready := newReadiness()
			c, node, err := s.load(cmd.Flags())
			if err != nil {
				ready.tell(err)
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			err = runDaemon(ctx, c, node, ready)
			ready.tell(err)
			return err
		},
	}
}

func newLogger(c config) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Log.Level)); err != nil {
		level = slog.LevelInfo // resolve has checked the word already
	}
	options := &slog.HandlerOptions{Level: level}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

// runDaemon wires the folders and serves until ctx ends. Pods go on without it.
func runDaemon(ctx context.Context, c config, node rootless.Node, ready *readiness) (err error) {
	log := newLogger(c).With("node", node.Name)
	// No core file, which would hold credentials of registries (core(5)); and who may trace takes a capability more.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core files: %w", err)
	}
	record, err := node.ReadRecord()
	if err != nil {
		// Only people read what it says.
		log.Error("the node's record cannot be read", "err", err)
		record.Driver, record.CgroupFound = c.Network.Driver, "unknown: "+err.Error()
	}
	tree, err := cgroupv2.Open("/sys/fs/cgroup")
	if err != nil {
		return err
	}
	store, err := images.Open(c.imageStore(filepath.Join(node.DataDir, "images"), log))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	network, err := netslirp.Open(netslirp.Config{NetNS: node.NetNS(), APISocket: portsSocket(node), Dir: filepath.Join(node.RuntimeDir, "net"),
		PodCIDR: c.Network.PodCIDR, MTU: c.Network.MTU, Bridge: "coracle0", DNS: "10.0.2.3", HostResolvConf: "/etc/resolv.conf", Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, network.Close()) }()
	podConfig, err := newPodConfig(c, node, record, tree, log)
	if err != nil {
		return err
	}
	podConfig.Handlers = podHandlers(ctx, c.Handlers, log)
	service, err := pod.Open(ctx, podConfig, pod.Deps{Containers: pod.KeeperContainers(ctr.NewClient(node.KeeperSocket())),
		Network: network, Images: store, Cgroups: tree})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, service.Close()) }()
	server := newServer(ctx, c.GRPC, service, images.NewService(store, slices.Collect(maps.Keys(c.Handlers))...), log)
	admin := &http.Server{Handler: adminHandler(store), ReadHeaderTimeout: 5 * time.Second}
	return servers{cri: server, admin: admin}.serve(ctx, node, ready, log)
}

type servers struct {
	cri   *grpc.Server
	admin *http.Server
}

func (s servers) serve(ctx context.Context, node rootless.Node, ready *readiness, log *slog.Logger) error {
	cri, err := listenOwn(node.Socket(), log)
	if err != nil {
		return err
	}
	admin, err := listenOwn(adminSocket(node), log)
	if err != nil {
		return errors.Join(err, cri.Close())
	}
	failed := make(chan error, 2)
	go func() { failed <- s.cri.Serve(cri) }()
	go func() { failed <- s.admin.Serve(admin) }()
	ready.tell(nil)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	threads.Keep(threads.Spare)
	settle.InQuiet(log)
	log.Info("serving", "endpoint", node.Endpoint(), "version", version, "pid", os.Getpid())
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
		err = fmt.Errorf("serve: %w", err)
	}
	forced := time.AfterFunc(drainTimeout, s.cri.Stop)
	s.cri.GracefulStop()
	forced.Stop()
	return errors.Join(err, s.admin.Close())
}

// newPodConfig gathers what the CRI service is to know of the host.
func newPodConfig(c config, node rootless.Node, record rootless.Record, tree *cgroupv2.Tree, log *slog.Logger) (pod.Config, error) {
	controllers := tree.Controllers()
	slices.Sort(controllers)
	host, err := ctr.GatherHost(ctr.HostOptions{CgroupUsable: tree.Usable(), Controllers: controllers, Strict: c.Limits == "strict",
		CDISpecDirs: c.CDIDirs})
	if err != nil {
		return pod.Config{}, err
	}
	return pod.Config{
		RuntimeDir: node.RuntimeDir, DataDir: node.DataDir, Version: version, StreamAddr: c.Streaming.Address,
		Host: host, Policy: c.Limits,
		Conditions: []pod.Condition{cgroupCondition(record, tree, controllers)},
		SysInfo: map[string]string{"node": node.Name, "networkDriver": record.Driver, "cgroup": record.CgroupFound,
			"cgroupControllers": strings.Join(controllers, " "), "limits": c.Limits},
		Log: log,
	}, nil
}

// wanted are the controllers that the CRI's resources need.
var wanted = []string{"cpu", "cpuset", "io", "memory", "pids"}

func cgroupCondition(record rootless.Record, tree *cgroupv2.Tree, have []string) pod.Condition {
	var missing []string
	for _, w := range wanted {
		if !tree.Usable() || !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	if len(missing) == 0 {
		return pod.Condition{Type: "ResourceLimits", Status: true, Reason: "AllControllers", Message: record.CgroupFound}
	}
	return pod.Condition{Type: "ResourceLimits", Status: false, Reason: "MissingControllers",
		Message: strings.Join(slices.DeleteFunc([]string{"limits of " + strings.Join(missing, ", ") + " are not applied",
			tree.Reason(), "`coracle status` says what this host gives and how to get the rest"}, func(s string) bool { return s == "" }), "; ")}
}
