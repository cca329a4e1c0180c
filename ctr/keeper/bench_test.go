package keeper_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/keeper"
)

// keeperEnv names a coracle-keeper to measure; without it the benchmarks measure the keeper in this binary, whose
// init is slower by what the tests link.
const keeperEnv = "CORACLE_BENCH_KEEPER"

// benchRuntime is the OCI runtime program that is measured in place of libcontainer, where CORACLE_BENCH_RUNTIME names one.
func benchRuntime() *ctr.Runtime {
	if path := os.Getenv("CORACLE_BENCH_RUNTIME"); path != "" {
		return &ctr.Runtime{Path: path}
	}
	return nil
}

func benchNode(b *testing.B) *ctr.Client {
	b.Helper()
	if err := prepareOnce(); err != nil {
		b.Fatal(err)
	}
	dir, err := os.MkdirTemp(base, "b")
	if err != nil {
		b.Fatal(err)
	}
	if program := os.Getenv(keeperEnv); program != "" {
		cmd := exec.Command(program, "--runtime-dir", dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() })
	} else {
		k, err := keeper.Open(keeper.Config{RuntimeDir: dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- k.Run(ctx) }()
		b.Cleanup(func() {
			cancel()
			if err := <-ended; err != nil {
				b.Error(err)
			}
		})
	}
	c := ctr.NewClient(filepath.Join(dir, keeper.SocketName))
	for range 5000 {
		if _, err := c.Info(context.Background()); err == nil {
			return c
		}
		time.Sleep(time.Millisecond)
	}
	b.Fatal("the keeper does not answer")
	return nil
}

func reportMedian(b *testing.B, times []time.Duration, unit string) {
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), unit)
}

// BenchmarkContainer measures create, start and delete of one container, each over its own connection.
func BenchmarkContainer(b *testing.B) {
	c, ctx := benchNode(b), context.Background()
	var create, start, remove []time.Duration
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprintf("c%d", i)
		t0 := time.Now()
		if _, err := c.Create(ctx, ctr.CreateRequest{ID: id, Spec: spec("sleep", "1000"), LogPath: filepath.Join(base, "bench.log"),
			Runtime: benchRuntime()}); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, err := c.Start(ctx, id); err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		if err := c.Delete(ctx, id); err != nil {
			b.Fatal(err)
		}
		create, start, remove = append(create, t1.Sub(t0)), append(start, t2.Sub(t1)), append(remove, time.Since(t2))
	}
	reportMedian(b, create, "create-p50-µs")
	reportMedian(b, start, "start-p50-µs")
	reportMedian(b, remove, "delete-p50-µs")
}

// BenchmarkExec measures an exec of true, from the call to the exit code.
func BenchmarkExec(b *testing.B) {
	c, ctx := benchNode(b), context.Background()
	if _, err := c.Create(ctx, ctr.CreateRequest{ID: "c", Spec: spec("sleep", "1000"), Runtime: benchRuntime()}); err != nil {
		b.Fatal(err)
	}
	if _, err := c.Start(ctx, "c"); err != nil {
		b.Fatal(err)
	}
	var times []time.Duration
	for b.Loop() {
		t0 := time.Now()
		s, err := c.Exec(ctx, ctr.ExecRequest{ContainerID: "c", Process: process("true")})
		if err != nil {
			b.Fatal(err)
		}
		if code, err := s.Wait(ctx); code != 0 || err != nil {
			b.Fatal(code, err)
		}
		times = append(times, time.Since(t0))
		_ = s.Close()
	}
	reportMedian(b, times, "exec-p50-µs")
}

// BenchmarkLog measures the copy of a container's output into its log.
func BenchmarkLog(b *testing.B) {
	c, ctx := benchNode(b), context.Background()
	const megabytes = 50
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprintf("c%d", i)
		path := filepath.Join(base, id+".log")
		if _, err := c.Create(ctx, ctr.CreateRequest{ID: id, Spec: sh(fmt.Sprintf("yes 0123456789012345678901234567890123456789012345678901234567890123456789012345678 | head -c %d", megabytes<<20)), LogPath: path}); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Start(ctx, id); err != nil {
			b.Fatal(err)
		}
		t0 := time.Now()
		for {
			states, err := c.List(ctx)
			if err != nil {
				b.Fatal(err)
			}
			if slices.ContainsFunc(states, func(s ctr.State) bool { return s.ID == id && s.Exited() }) {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		b.ReportMetric(megabytes/time.Since(t0).Seconds(), "MB/s")
		if err := c.Delete(ctx, id); err != nil {
			b.Fatal(err)
		}
		_ = os.Remove(path)
	}
}
