package faults

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestRestart measures how long the CRI is away when its daemon is killed with 50 pods of one container each: from SIGKILL
// to the answer of Version, and to a list of all containers.
func TestRestart(t *testing.T) {
	pods, rounds := 50, 5
	if testing.Short() {
		pods, rounds = 5, 1
	}
	n := up(t, shipped)
	image := n.pullBusybox()
	for i := range pods {
		if _, _, err := n.run(fmt.Sprint("p", i), image, "exec sleep 10000"); err != nil {
			t.Fatal(err)
		}
	}
	var version, list []time.Duration
	for i := range rounds {
		if i > 0 {
			time.Sleep(steady)
		}
		killed := time.Now()
		n.killDaemon()
		awaitListener(t, filepath.Join(n.runtimeDir(), "coracle.sock"))
		runtime := runtimeapi.NewRuntimeServiceClient(dial(t, n.address)) // one that has not to notice first that a daemon has ended
		if _, err := runtime.Version(n.context(), &runtimeapi.VersionRequest{}); err != nil {
			t.Fatal(err)
		}
		version = append(version, time.Since(killed))
		all, err := runtime.ListContainers(n.context(), &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}})
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, time.Since(killed))
		if len(all.Containers) != pods {
			t.Fatalf("%d containers run, want %d", len(all.Containers), pods)
		}
	}
	t.Logf("%d pods, %d times; from SIGKILL of the daemon, median (least, most): Version %s, ListContainers %s", pods, rounds, spread(version), spread(list))
}

// steady is how long a daemon must have been up for the keeper to start the next one without a pause, as it does when it
// loses its first, and some more.
const steady = 11 * time.Second

// awaitListener does by connect(2) alone what a gRPC client does with pauses.
func awaitListener(t *testing.T, socket string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(errors.Join(errors.New("the daemon does not come back"), err))
		}
		time.Sleep(500 * time.Microsecond)
	}
}

func spread(all []time.Duration) string {
	s := slices.Sorted(slices.Values(all))
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }
	return fmt.Sprintf("%s ms (%s, %s)", ms(s[len(s)/2]), ms(s[0]), ms(s[len(s)-1]))
}
