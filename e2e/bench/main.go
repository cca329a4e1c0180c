// Command bench times the calls of a CRI runtime, one pod after another, and prints medians in milliseconds. It knows
// nothing of coracle: any runtime's socket will do.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The rows, in the order in which a pod goes through them.
var rows = []string{"RunPodSandbox", "CreateContainer", "StartContainer", "RunPodSandbox to running", "ExecSync of true", "StopContainer(0) to pod removed"}

func main() {
	b := bench{times: map[string][]time.Duration{}}
	endpoint := flag.String("endpoint", os.Getenv("CONTAINER_RUNTIME_ENDPOINT"), "socket of the runtime, unix://PATH (CONTAINER_RUNTIME_ENDPOINT)")
	flag.StringVar(&b.image, "image", "", "image, with a /bin/sleep and a /bin/true")
	pull := flag.Bool("pull", false, "pull the image first")
	flag.BoolVar(&b.sharePID, "share-pid", false, "one pid namespace for the pod, as shareProcessNamespace asks for")
	flag.BoolVar(&b.seccomp, "seccomp", false, "ask for the runtime's default seccomp profile")
	count := flag.Int("count", 20, "pods")
	flag.BoolVar(&b.lists, "lists", false, "run all pods at once, and time the lists of them")
	flag.Parse()
	if err := b.run(*endpoint, *count, *pull); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	image    string
	seccomp  bool
	sharePID bool
	lists    bool
	runtime  runtimeapi.RuntimeServiceClient
	logs     string
	times    map[string][]time.Duration
}

func (b *bench) run(endpoint string, count int, pull bool) error {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	b.runtime = runtimeapi.NewRuntimeServiceClient(conn)
	if b.logs, err = os.MkdirTemp("", "bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.logs)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if pull {
		request := &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: b.image}}
		if _, err := runtimeapi.NewImageServiceClient(conn).PullImage(ctx, request); err != nil {
			return err
		}
	}
	if b.lists {
		if err := b.standing(ctx, count); err != nil {
			return err
		}
		return b.print(fmt.Sprintf("%d pods running, each list %d times", count, rounds), listRows)
	}
	// The first pod warms caches of the machine's, and is not counted.
	for i := -1; i < count; i++ {
		if i == 0 {
			clear(b.times)
		}
		if err := b.pod(ctx, i); err != nil {
			return fmt.Errorf("pod %d: %w", i+1, err)
		}
	}
	profile := "no seccomp profile"
	if b.seccomp {
		profile = "the default seccomp profile"
	}
	return b.print(fmt.Sprintf("%d pods, one after another, %s", count, profile), rows)
}

// took adds the time since began to a row.
func (b *bench) took(row string, began time.Time) {
	b.times[row] = append(b.times[row], time.Since(began))
}

// namespaces are what a kubelet asks for: a pid namespace for each container, unless the pod's spec shares one.
func (b *bench) namespaces() *runtimeapi.NamespaceOption {
	if b.sharePID {
		return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	}
	return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
}

func (b *bench) profile() *runtimeapi.SecurityProfile {
	if b.seccomp {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
}

func (b *bench) pod(ctx context.Context, i int) error {
	began := time.Now()
	pod, container, err := b.launch(ctx, i)
	if err == nil {
		b.took(rows[3], began)
		err = b.end(ctx, pod, container)
	}
	if err != nil && pod != "" {
		_, _ = b.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
	}
	return err
}

// launch runs a pod with a container. It returns the ids of what there is, with an error, too.
func (b *bench) launch(ctx context.Context, i int) (pod, container string, err error) {
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), i+1)
	config := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: name, Namespace: "bench"},
		Hostname: "bench", LogDirectory: filepath.Join(b.logs, name),
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			Seccomp: b.profile(), NamespaceOptions: b.namespaces()}}}
	at := time.Now()
	sandbox, err := b.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		return "", "", err
	}
	b.took(rows[0], at)
	at = time.Now()
	created, err := b.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox.PodSandboxId, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: b.image},
			Command: []string{"/bin/sleep", "1000"}, LogPath: "c.log",
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				Seccomp: b.profile(), NamespaceOptions: b.namespaces()}}}})
	if err != nil {
		return sandbox.PodSandboxId, "", err
	}
	b.took(rows[1], at)
	at = time.Now()
	if _, err := b.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		return sandbox.PodSandboxId, created.ContainerId, err
	}
	b.took(rows[2], at)
	return sandbox.PodSandboxId, created.ContainerId, nil
}

// end makes sure that the container runs, and takes everything away.
func (b *bench) end(ctx context.Context, pod, container string) error {
	status, err := b.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container})
	if err != nil {
		return err
	}
	if status.Status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("the container is %s after StartContainer: %s", status.Status.State, status.Status.Message)
	}
	at := time.Now()
	answer, err := b.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"/bin/true"}})
	if err != nil {
		return err
	}
	if answer.ExitCode != 0 {
		return fmt.Errorf("true ended with %d: %s", answer.ExitCode, answer.Stderr)
	}
	b.took(rows[4], at)
	at = time.Now()
	if _, err := b.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: container}); err != nil {
		return err
	}
	if _, err := b.runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: container}); err != nil {
		return err
	}
	if _, err := b.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	if _, err := b.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	b.took(rows[5], at)
	return nil
}

// print prints a table of rows.
func (b *bench) print(title string, rows []string) error {
	fmt.Printf("%s; milliseconds\n", title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "  "+strings.Repeat(" ", 31)+"\tmedian\tp95\tleast\t")
	for _, row := range rows {
		t := slices.Sorted(slices.Values(b.times[row]))
		fmt.Fprintf(w, "  %-31s\t%s\t%s\t%s\t\n", row, ms(t[len(t)/2]), ms(t[(len(t)*95-1)/100]), ms(t[0]))
	}
	return w.Flush()
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }
