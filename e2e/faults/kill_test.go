package faults

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestKillLoop kills the daemon at random moments while pods start, run, log, execute commands, stop and are removed (life),
// and beside them some that run through it all. Every so often everything stands still, and the CRI's word is compared with
// the facts.
func TestKillLoop(t *testing.T) {
	kills, workers, every := 200, 4, 20
	if testing.Short() {
		kills, workers, every = 10, 2, 5
	}
	n := up(t, shipped)
	image := n.pullBusybox()
	if _, _, err := n.run("warm", image, "exit 0"); err != nil { // the first pod makes directories that stay
		t.Fatal(err)
	}
	if err := n.removeAll(); err != nil {
		t.Fatal(err)
	}
	before, err := n.census()
	if err != nil {
		t.Fatal(err)
	}
	standing := n.stand(image, 3)

	var lives atomic.Int64
	var quiet sync.RWMutex // a life is lived with it held for reading
	var group sync.WaitGroup
	stop, failed := make(chan struct{}), make(chan error, workers)
	for w := range workers {
		group.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				quiet.RLock()
				l := life{node: n, image: image, name: fmt.Sprintf("w%d-%d", w, i), kind: i % kinds}
				err := l.live()
				quiet.RUnlock()
				lives.Add(1)
				if err != nil {
					failed <- fmt.Errorf("pod %s: %w", l.name, err)
					return
				}
			}
		})
	}
	n.killAtRandom(kills, failed, func(i int) {
		if (i+1)%every != 0 {
			return
		}
		quiet.Lock()
		defer quiet.Unlock()
		if err := errors.Join(n.awaitDaemon(), n.agrees(), standing.unchanged()); err != nil {
			t.Errorf("after %d kills: %v", i+1, err)
		}
	})
	close(stop)
	group.Wait()
	t.Logf("%d kills; %d pods came and went meanwhile", kills, lives.Load())
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if err := errors.Join(standing.end(), n.agrees(), n.removeAll(), n.same(before)); err != nil {
		t.Error(err)
	}
}

// killAtRandom kills one daemon after the other, each at a random age: a quarter of them while they take over. It ends
// early when somebody has failed.
func (n *node) killAtRandom(kills int, failed <-chan error, then func(i int)) {
	for i := range kills {
		var pid int
		eventually(n.t, "the keeper starts another daemon", func() (err error) {
			pid, err = n.daemon()
			return err
		})
		age := rand.N(1500 * time.Millisecond)
		if i%4 == 0 {
			age = rand.N(60 * time.Millisecond)
		}
		time.Sleep(age)
		if err := killAndWait(pid); err != nil {
			n.t.Errorf("kill the daemon: %v", err)
		}
		if then(i); len(failed) > 0 || n.t.Failed() {
			n.t.Logf("given up after %d kills", i+1)
			return
		}
	}
}

// standers are containers that run from the beginning to the end.
type standers struct {
	*node
	lives []life
	seen  []*runtimeapi.ContainerStatus
	pids  []int
}

func (n *node) stand(image string, count int) *standers {
	n.t.Helper()
	s := &standers{node: n}
	for i := range count {
		l := life{node: n, image: image, name: fmt.Sprint("stands-", i), kind: untilStopped}
		if err := errors.Join(l.ensurePod(), l.ensureCreated(), l.ensureStarted()); err != nil {
			n.t.Fatal(err)
		}
		status, err := l.status()
		if err != nil {
			n.t.Fatal(err)
		}
		pid, err := n.keeperPid(l.container)
		if err != nil {
			n.t.Fatal(err)
		}
		s.lives, s.seen, s.pids = append(s.lives, l), append(s.seen, status), append(s.pids, pid)
	}
	return s
}

// unchanged: each is the process that it was, and was started when it was.
func (s *standers) unchanged() error {
	var errs []error
	for i, l := range s.lives {
		status, err := l.status()
		if err != nil {
			return err
		}
		pid, err := s.keeperPid(l.container)
		errs = append(errs, err)
		if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING || status.StartedAt != s.seen[i].StartedAt || pid != s.pids[i] {
			errs = append(errs, fmt.Errorf("container %s was process %d: it is %d, %s, started at %d", l.name, s.pids[i], pid, status.State, status.StartedAt))
		}
	}
	return errors.Join(errs...)
}

func (s *standers) end() error {
	errs := []error{s.unchanged()}
	for i := range s.lives {
		errs = append(errs, s.lives[i].end())
	}
	return errors.Join(errs...)
}

// removeAll removes every pod.
func (n *node) removeAll() error {
	pods, err := n.runtime.ListPodSandbox(n.context(), &runtimeapi.ListPodSandboxRequest{})
	errs := []error{err}
	for _, p := range pods.GetItems() {
		_, err := n.runtime.RemovePodSandbox(n.context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
		errs = append(errs, err)
	}
	return errors.Join(append(errs, os.RemoveAll(n.path("work", "logs")))...)
}
