package keeper_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr"
)

// attached is a caller of Attach and its ends of the streams.
type attached struct {
	in       *os.File
	out, err *bufio.Scanner
	done     chan error
	cancel   context.CancelFunc
}

func (n *node) attach(id string) attached {
	inR, inW := pipe(n.t)
	outR, outW := pipe(n.t)
	errR, errW := pipe(n.t)
	ctx, cancel := context.WithCancel(context.Background())
	a := attached{in: inW, out: bufio.NewScanner(outR), err: bufio.NewScanner(errR), done: make(chan error, 1), cancel: cancel}
	go func() { a.done <- n.Attach(ctx, id, ctr.Streams{Stdin: inR, Stdout: outW, Stderr: errW}) }()
	return a
}

func TestAttachReadsAndWrites(t *testing.T) {
	n := newNode(t)
	stdin := func(r *ctr.CreateRequest) { r.Stdin = true }
	n.create("c1", sh("while read line; do echo out $line; echo err $line >&2; [ $line = end ] && exit 3; done; exit 4"), stdin)
	n.start("c1")
	say := func(a attached, word string, to ...attached) {
		t.Helper()
		if _, err := a.in.WriteString(word + "\n"); err != nil {
			t.Fatal(err)
		}
		for _, r := range to {
			if !r.out.Scan() || r.out.Text() != "out "+word || !r.err.Scan() || r.err.Text() != "err "+word {
				t.Fatalf("%q: out %q, err %q", word, r.out.Text(), r.err.Text())
			}
		}
	}
	a := n.attach("c1")
	say(a, "one", a)
	b := n.attach("c1")
	defer b.cancel()
	say(b, "two", b, a) // b's answer shows that it is attached
	say(a, "three", a, b)
	// a goes; without stdin_once the container's stdin stays open for b.
	a.cancel()
	if err := <-a.done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled attach: %v", err)
	}
	if a.out.Scan() {
		t.Errorf("output after the end of the attach: %q", a.out.Text())
	}
	say(b, "four", b)
	say(b, "end", b)
	if err := <-b.done; err != nil {
		t.Errorf("attach at the exit: %v", err)
	}
	if b.out.Scan() || b.err.Scan() {
		t.Error("more output than there was")
	}
	if s := n.exit("c1"); s.ExitCode != 3 {
		t.Errorf("exit %+v", s)
	}
	if got := len(n.lines("c1")); got != 10 {
		t.Errorf("%d lines in the log, want 10", got)
	}
	if err := n.Attach(context.Background(), "c1", ctr.Streams{}); !errors.Is(err, ctr.ErrNotRunning) {
		t.Errorf("attach after the exit: %v", err)
	}
}

func TestStdinOnceClosesStdinWithTheFirstAttach(t *testing.T) {
	n := newNode(t)
	n.create("once", sh("cat; echo eof"), func(r *ctr.CreateRequest) { r.Stdin, r.StdinOnce = true, true })
	n.start("once")
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	done := make(chan error, 1)
	go func() {
		done <- n.Attach(context.Background(), "once", ctr.Streams{Stdin: inR, Stdout: outW})
	}()
	if _, err := inW.WriteString("in\n"); err != nil {
		t.Fatal(err)
	}
	inW.Close()
	if got := readAll(t, outR); got != "in\neof\n" {
		t.Errorf("output %q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	n.exit("once")
}

func TestAnAttachedReaderThatStopsDoesNotStopTheLog(t *testing.T) {
	n := newNode(t)
	const lines = 200000 // more than the sink and both pipes hold
	n.create("c1", sh(fmt.Sprintf("read go; seq 1 %d; sleep 1000", lines)), func(r *ctr.CreateRequest) { r.Stdin = true })
	n.start("c1")
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	stuckR, stuckW := pipe(t)
	stuck, reading := make(chan error, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { stuck <- n.Attach(ctx, "c1", ctr.Streams{Stdout: stuckW}) }()
	go func() { reading <- n.Attach(ctx, "c1", ctr.Streams{Stdin: inR, Stdout: outW}) }()
	time.Sleep(100 * time.Millisecond) // both are attached
	if _, err := inW.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	got := bufio.NewScanner(io.LimitReader(outR, 1<<30))
	for i := 1; i <= lines; i++ {
		if !got.Scan() || got.Text() != fmt.Sprint(i) {
			t.Fatalf("line %d for the reader that reads is %q", i, got.Text())
		}
	}
	eventually(t, "the log is whole", func() bool { return len(n.lines("c1")) == lines })
	t.Logf("%d lines took %s", lines, time.Since(begun))
	if err := <-stuck; err == nil || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("the reader that stopped: %v", err)
	}
	_ = stuckR.Close()
	n.delete("c1")
	if err := <-reading; err != nil {
		t.Error(err)
	}
}

func TestAContainerHasATerminal(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	s := sh("stty size; read line; stty size; echo got $line; exit 8")
	s.Process.Terminal, s.Process.ConsoleSize = true, &specs.Box{Width: 80, Height: 24}
	n.create("c1", s, func(r *ctr.CreateRequest) { r.TTY, r.Stdin = true, true })
	n.start("c1")
	eventually(t, "the first size is logged", func() bool { return len(n.lines("c1")) == 1 })
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	done := make(chan error, 1)
	go func() { done <- n.Attach(ctx, "c1", ctr.Streams{Stdin: inR, Stdout: outW}) }()
	if err := n.Resize(ctx, "c1", 132, 50); err != nil {
		t.Fatal(err)
	}
	if _, err := inW.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	if got := readAll(t, outR); got != "typed\r\n50 132\r\ngot typed\r\n" {
		t.Errorf("attached output %q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := n.exit("c1"); s.ExitCode != 8 {
		t.Errorf("exit %+v", s)
	}
	want := "stdout F 24 80\r|stdout F typed\r|stdout F 50 132\r|stdout F got typed\r"
	if got := strings.Join(n.lines("c1"), "|"); got != want {
		t.Errorf("log %q", got)
	}
	if err := n.Resize(ctx, "c1", 1, 1); !errors.Is(err, ctr.ErrNotRunning) {
		t.Errorf("resize after the exit: %v", err)
	}
	n.idle("pipes")
	if err := n.Resize(ctx, "pipes", 1, 1); err == nil || errors.Is(err, ctr.ErrNotRunning) {
		t.Errorf("resize without a terminal: %v", err)
	}
}
