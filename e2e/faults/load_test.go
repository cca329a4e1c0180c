package faults

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestLoad has 100 pods at once for ten minutes, with a command in each and the stats of all every second: no call
// fails, and it is printed how long they take.
func TestLoad(t *testing.T) {
	pods, duration := 100, 10*time.Minute
	if testing.Short() {
		pods, duration = 10, 3*time.Second
	}
	n := up(t, shipped)
	image := n.pullBusybox()
	ids, began := make([]string, pods), time.Now()
	if err := atOnce(pods, 10, func(i int) (err error) {
		_, ids[i], err = n.run(fmt.Sprint("p", i), image, "while :; do echo working; sleep 1; done")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pods, 10 at once, run after %s", pods, time.Since(began).Round(time.Millisecond))
	daemon, keeper := n.used()
	load := load{node: n, ids: ids, took: map[string][]time.Duration{}}
	late, rounds := 0, 0
	for began = time.Now(); time.Since(began) < duration; rounds++ {
		second := time.Now()
		load.round()
		if t.Failed() {
			return
		}
		if rest := time.Second - time.Since(second); rest > 0 {
			time.Sleep(rest)
		} else {
			late++
		}
	}
	daemonNow, keeperNow := n.used()
	seconds := time.Since(began).Seconds()
	t.Logf("%d rounds, %d of them over a second; of a CPU the daemon used %.0f %%, the keeper %.0f %%",
		rounds, late, 100*(daemonNow-daemon)/seconds, 100*(keeperNow-keeper)/seconds)
	load.print()
}

// used are the CPU seconds of the daemon and of the keeper.
func (n *node) used() (daemon, keeper float64) {
	n.t.Helper()
	d, err1 := n.daemon()
	k, err2 := n.keeper()
	if err := errors.Join(err1, err2); err != nil {
		n.t.Fatal(err)
	}
	return cpuSeconds(n.t, d), cpuSeconds(n.t, k)
}

type load struct {
	*node
	ids []string

	mu   sync.Mutex
	took map[string][]time.Duration
}

// round asks for the stats of all and executes a command in each, ten at once.
func (l *load) round() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := l.timed("ListContainerStats", func() error {
		answer, err := l.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
		if err == nil && len(answer.Stats) != len(l.ids) {
			err = fmt.Errorf("stats of %d containers", len(answer.Stats))
		}
		return err
	})
	err = errors.Join(err, l.timed("ListPodSandboxStats", func() error {
		answer, err := l.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
		if err == nil && len(answer.Stats) != len(l.ids) {
			err = fmt.Errorf("stats of %d pods", len(answer.Stats))
		}
		return err
	}))
	err = errors.Join(err, atOnce(len(l.ids), 10, func(i int) error {
		return l.timed("ExecSync", func() error { return l.says(ctx, l.ids[i], fmt.Sprint("p", i), "hostname") })
	}))
	if err != nil {
		l.t.Error(err)
	}
}

// says runs a command in a container and compares what it prints.
func (n *node) says(ctx context.Context, container, want string, command ...string) error {
	answer, err := n.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: int64(patience.Seconds())})
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(answer.Stdout)); got != want || answer.ExitCode != 0 {
		return fmt.Errorf("%v: exit code %d, %q, want %q", command, answer.ExitCode, got, want)
	}
	return nil
}

func (l *load) timed(what string, do func() error) error {
	began := time.Now()
	err := do()
	took := time.Since(began)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took[what] = append(l.took[what], took)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (l *load) print() {
	for _, what := range []string{"ListContainerStats", "ListPodSandboxStats", "ExecSync"} {
		s := slices.Sorted(slices.Values(l.took[what]))
		l.t.Logf("%-20s %6d calls; median %s, p99 %s, most %s", what, len(s), s[len(s)/2], s[(len(s)*99-1)/100], s[len(s)-1])
	}
}

// atOnce calls do for 0 … count-1, so many at once, and returns all errors.
func atOnce(count, most int, do func(i int) error) error {
	var wg sync.WaitGroup
	slots, errs := make(chan struct{}, most), make([]error, count)
	for i := range count {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			errs[i] = do(i)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// TestExecsAtOnce runs 200 commands at once, in one container and in several: each answers with its own words.
func TestExecsAtOnce(t *testing.T) {
	execs := 200
	if testing.Short() {
		execs = 40
	}
	n := up(t, shipped)
	image := n.pullBusybox()
	var ids []string
	for i := range 4 {
		_, id, err := n.run(fmt.Sprint("p", i), image, "exec sleep 10000")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	before := n.settled(nil)
	for _, spread := range []int{1, len(ids)} {
		began := time.Now()
		if err := atOnce(execs, execs, func(i int) error {
			return n.says(n.context(), ids[i%spread], fmt.Sprint("word ", i), "sh", "-c", fmt.Sprintf("sleep 0.2; echo word %d", i))
		}); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d commands at once in %d containers: all have ended after %s", execs, spread, time.Since(began).Round(time.Millisecond))
	}
	for _, d := range n.settled(before).differences(before) {
		t.Errorf("after them there are other %s", d)
	}
}
