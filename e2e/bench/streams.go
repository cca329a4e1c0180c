package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// streamBytes is what a command in a container writes to its standard output for a client.
const streamBytes = 1 << 30

// linesRepeated is how often the file of lines is written to a container's log.
const linesRepeated = 50

// execStream executes a command whose output goes to a client in the runtime's network. The result is in MB/s.
func (n *node) execStream(ctx context.Context, r running) (float64, error) {
	answer, err := n.runtime.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: r.container, Stdout: true, Stderr: true,
		Cmd: []string{"/bin/dd", "if=/dev/zero", "bs=64k", "count=" + strconv.Itoa(streamBytes>>16)}})
	if err != nil {
		return 0, err
	}
	cmd := n.inside("stream", answer.Url)
	cmd.Stderr = os.Stderr
	raw, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("stream from %s: %w", n.name, err)
	}
	var got streamed
	if err := json.Unmarshal(raw, &got); err != nil {
		return 0, err
	}
	if got.Bytes != streamBytes {
		return 0, fmt.Errorf("%d bytes came, of %d", got.Bytes, streamBytes)
	}
	return float64(got.Bytes) / 1e6 / got.Seconds, nil
}

// streamed is what the client of a stream tells.
type streamed struct {
	Bytes   int64
	Seconds float64
}

// streamCommand is a client: bench stream URL. The time runs from the first byte.
func streamCommand(args []string) error {
	u, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	if err != nil {
		return err
	}
	count := &counter{}
	if err := executor.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdout: count, Stderr: io.Discard}); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(streamed{Bytes: count.n, Seconds: time.Since(count.began).Seconds()})
}

type counter struct {
	n     int64
	began time.Time
}

func (c *counter) Write(p []byte) (int, error) {
	if c.n == 0 {
		c.began = time.Now()
	}
	c.n += int64(len(p))
	return len(p), nil
}

// ReadFrom takes what is there by large reads, as a client does that passes it on.
func (c *counter) ReadFrom(r io.Reader) (int64, error) {
	buf := make([]byte, 256<<10)
	before := c.n
	for {
		n, err := r.Read(buf)
		if n > 0 {
			_, _ = c.Write(buf[:n])
		}
		if errors.Is(err, io.EOF) {
			return c.n - before, nil
		} else if err != nil {
			return c.n - before, err
		}
	}
}

// logLines runs a container that writes lines of 100 bytes, and waits until all are in its log. The result is the bytes that
// it has written, a second, in MB/s.
func (n *node) logLines(ctx context.Context) (rate float64, err error) {
	if err := touchMemory(n.logs, linesCount*linesRepeated*150); err != nil {
		return 0, err
	}
	script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do cat %s; i=$((i+1)); done", linesRepeated, linesPath)
	r, err := n.launch(ctx, podOptions{command: []string{"/bin/sh", "-c", script}})
	began := time.Now()
	if err != nil {
		return 0, errors.Join(err, n.discard(ctx, r.pod))
	}
	defer func() { err = errors.Join(err, n.end(ctx, r)) }()
	const want = linesCount * linesRepeated
	for size, still := int64(-1), 0; still < 20; {
		time.Sleep(2 * time.Millisecond)
		var st unix.Stat_t
		if err := unix.Stat(r.log, &st); err != nil {
			return 0, err
		}
		if st.Size != size {
			size, still = st.Size, 0
			rate = want * 100 / 1e6 / time.Since(began).Seconds()
			continue
		}
		still++
		if size < want*100 {
			still = min(still, 1)
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("the log has %d bytes: %w", size, ctx.Err())
		}
	}
	return rate, checkLines(r.log, want)
}

// touchMemory writes a file and removes it, so that the memory which the log takes next is the machine's. A virtual machine
// gives free memory back to its host (free page reporting), and the first touch of a page waits for the host: dd alone then
// writes 345 MB/s to a tmpfs, and 3 GB/s to memory that it has.
func touchMemory(dir string, size int) error {
	f, err := os.CreateTemp(dir, "touch-")
	if err != nil {
		return err
	}
	chunk := make([]byte, 1<<20)
	for ; err == nil && size > 0; size -= len(chunk) {
		_, err = f.Write(chunk)
	}
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}

// checkLines makes sure that a log has that many lines.
func checkLines(path string, want int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf, lines := make([]byte, 1<<20), 0
	for {
		n, err := f.Read(buf)
		for _, c := range buf[:n] {
			if c == '\n' {
				lines++
			}
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	if lines != want {
		return fmt.Errorf("the log has %d lines, of %d", lines, want)
	}
	return nil
}
