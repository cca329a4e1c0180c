package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The rows of a pod's life, in order.
const (
	rowSandbox = "RunPodSandbox"
	rowCreate  = "CreateContainer"
	rowStart   = "StartContainer"
	rowRunning = "RunPodSandbox to running"
	rowExec    = "ExecSync of true"
	rowRemoved = "StopContainer(0) to pod removed"
)

var lifeRows = []string{rowSandbox, rowCreate, rowStart, rowRunning, rowExec, rowRemoved}

// client calls one runtime.
type client struct {
	conn    *grpc.ClientConn
	runtime runtimeapi.RuntimeServiceClient
	images  runtimeapi.ImageServiceClient
	image   string // of the pods' containers
	logs    string
	made    atomic.Int64 // pods so far: their names differ
}

// podOptions are how a pod is run.
type podOptions struct {
	seccomp, sharePID bool
	command           []string // default: sleep
}

// running is a pod with a container that was started, and how long each call took.
type running struct {
	pod, container string
	log            string // path of the container's
	took           map[string]float64
}

// dial connects to a runtime; the logs of its containers go to a new directory below dir.
func dial(endpoint, image, dir string) (*client, error) {
	quick := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1, MaxDelay: time.Millisecond}, MinConnectTimeout: time.Second}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(quick),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, err
	}
	logs, err := os.MkdirTemp(dir, "logs-")
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &client{conn: conn, runtime: runtimeapi.NewRuntimeServiceClient(conn), images: runtimeapi.NewImageServiceClient(conn), image: image, logs: logs}, nil
}

func (c *client) close() {
	c.conn.Close()
	os.RemoveAll(c.logs)
}

// answers waits for the first answer: a server that listens may not be ready yet.
func (c *client) answers(ctx context.Context) error {
	for {
		_, err := c.runtime.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return err
		}
		time.Sleep(time.Millisecond / 2)
	}
}

func (c *client) pull(ctx context.Context, image string) error {
	_, err := c.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

func (c *client) removeImage(ctx context.Context, image string) error {
	_, err := c.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

// namespaces are what a kubelet asks for: a pid namespace for each container, unless the pod's spec shares one.
func (o podOptions) namespaces() *runtimeapi.NamespaceOption {
	if o.sharePID {
		return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	}
	return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
}

func (o podOptions) profile() *runtimeapi.SecurityProfile {
	if o.seccomp {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
}

// since is the time from a moment till now, in milliseconds.
func since(t time.Time) float64 { return float64(time.Since(t).Microseconds()) / 1000 }

// launch runs a pod with a container. With an error it returns what there is, too.
func (c *client) launch(ctx context.Context, o podOptions) (r running, err error) {
	r.took = map[string]float64{}
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), c.made.Add(1))
	config := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		Hostname: "bench", LogDirectory: filepath.Join(c.logs, name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			Seccomp: o.profile(), NamespaceOptions: o.namespaces()}}}
	r.log = filepath.Join(config.LogDirectory, "c.log")
	began := time.Now()
	sandbox, err := c.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return r, fmt.Errorf("RunPodSandbox: %w", err)
	}
	r.pod, r.took[rowSandbox] = sandbox.PodSandboxId, since(began)
	command := o.command
	if command == nil {
		command = []string{"/bin/sleep", "100000"}
	}
	at := time.Now()
	created, err := c.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: r.pod, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: c.image},
			Command: command, LogPath: "c.log",
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				Seccomp: o.profile(), NamespaceOptions: o.namespaces()}}}})
	if err != nil {
		return r, fmt.Errorf("CreateContainer: %w", err)
	}
	r.container, r.took[rowCreate] = created.ContainerId, since(at)
	at = time.Now()
	if _, err := c.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.container}); err != nil {
		return r, fmt.Errorf("StartContainer: %w", err)
	}
	r.took[rowStart], r.took[rowRunning] = since(at), since(began)
	return r, nil
}

// life runs a pod, makes sure that its container runs, executes true in it and takes everything away.
func (c *client) life(ctx context.Context, o podOptions) (map[string]float64, error) {
	r, err := c.launch(ctx, o)
	if err != nil {
		return nil, errors.Join(err, c.discard(ctx, r.pod))
	}
	if err := c.use(ctx, r); err != nil {
		return nil, errors.Join(err, c.discard(ctx, r.pod))
	}
	at := time.Now()
	if err := c.end(ctx, r); err != nil {
		return nil, err
	}
	r.took[rowRemoved] = since(at)
	return r.took, nil
}

func (c *client) use(ctx context.Context, r running) error {
	answered, err := c.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: r.container})
	if err != nil {
		return err
	}
	if answered.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("the container is %s after StartContainer: %s", answered.Status.State, answered.Status.Message)
	}
	at := time.Now()
	answer, err := c.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: r.container, Cmd: []string{"/bin/true"}})
	if err != nil {
		return err
	}
	if answer.ExitCode != 0 {
		return fmt.Errorf("true ended with %d: %s", answer.ExitCode, answer.Stderr)
	}
	r.took[rowExec] = since(at)
	return nil
}

// end stops a pod and removes it, as a kubelet does.
func (c *client) end(ctx context.Context, r running) error {
	if _, err := c.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: r.container}); err != nil {
		return err
	}
	if _, err := c.runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: r.container}); err != nil {
		return err
	}
	if _, err := c.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: r.pod}); err != nil {
		return err
	}
	_, err := c.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.pod})
	return err
}

// discard removes a pod of which a call failed.
func (c *client) discard(ctx context.Context, pod string) error {
	if pod == "" {
		return nil
	}
	_, err := c.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
	return err
}

// fleet is pods that run at the same time.
type fleet []running

// launchMany runs count pods, atOnce at a time; all that were made are in the answer, in the order of their making.
func (c *client) launchMany(ctx context.Context, count, atOnce int) (fleet, error) {
	out, errs := make(fleet, count), make([]error, count)
	each(count, atOnce, func(i int) { out[i], errs[i] = c.launch(ctx, podOptions{}) })
	return out, errors.Join(errs...)
}

// endMany removes a fleet, atOnce pods at a time.
func (c *client) endMany(ctx context.Context, f fleet, atOnce int) error {
	errs := make([]error, len(f))
	each(len(f), atOnce, func(i int) {
		if f[i].container == "" {
			errs[i] = c.discard(ctx, f[i].pod)
			return
		}
		errs[i] = c.end(ctx, f[i])
	})
	return errors.Join(errs...)
}

// each calls do with 0 to count-1, in order, atOnce at a time.
func each(count, atOnce int, do func(i int)) {
	var next atomic.Int64
	done := make(chan struct{})
	for range atOnce {
		go func() {
			for i := int(next.Add(1)) - 1; i < count; i = int(next.Add(1)) - 1 {
				do(i)
			}
			done <- struct{}{}
		}()
	}
	for range atOnce {
		<-done
	}
}

// socketPath is the path of a unix endpoint.
func socketPath(endpoint string) string { return strings.TrimPrefix(endpoint, "unix://") }
