package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/creack/pty"
)

// terminal is a program on a pseudo-terminal, with a person before it who types, waits for words and drags the
// window's corner.
type terminal struct {
	t    *testing.T
	tty  *os.File
	cmd  *exec.Cmd
	mu   sync.Mutex
	seen strings.Builder
	done sync.WaitGroup
	mark int // what is before it has been awaited already
}

func newTerminal(t *testing.T, cmd *exec.Cmd, rows, cols uint16) *terminal {
	t.Helper()
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: rows, Cols: cols})
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, tty: tty, cmd: cmd}
	term.done.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := tty.Read(buf)
			term.mu.Lock()
			term.seen.Write(buf[:n])
			term.mu.Unlock()
			if err != nil { // EIO: nobody has the other end open any more
				return
			}
		}
	})
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		tty.Close()
		term.done.Wait()
	})
	return term
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.seen.String()
}

func (term *terminal) typeIn(s string) {
	term.t.Helper()
	if _, err := term.tty.WriteString(s); err != nil {
		term.t.Fatalf("type %q: %v; the terminal shows:\n%s", s, err, term.text())
	}
}

func (term *terminal) resize(rows, cols uint16) {
	term.t.Helper()
	if err := pty.Setsize(term.tty, &pty.Winsize{Rows: rows, Cols: cols}); err != nil {
		term.t.Fatal(err)
	}
}

// await waits for text that matches, after what was awaited before, and returns it.
func (term *terminal) await(pattern string) string {
	term.t.Helper()
	re := regexp.MustCompile(pattern)
	var match string
	eventually(term.t, 15*time.Second, "the terminal shows "+pattern, func() error {
		all := term.text()
		at := re.FindStringIndex(all[term.mark:])
		if at == nil {
			return fmt.Errorf("it shows:\n%s", all[term.mark:])
		}
		match = all[term.mark+at[0] : term.mark+at[1]]
		term.mark += at[1]
		return nil
	})
	return match
}

// exitCode waits for the program's end.
func (term *terminal) exitCode() int {
	term.t.Helper()
	var slow atomic.Bool
	timer := time.AfterFunc(15*time.Second, func() { slow.Store(true); _ = term.cmd.Process.Kill() })
	defer timer.Stop()
	err := term.cmd.Wait()
	var exit *exec.ExitError
	switch {
	case slow.Load():
		term.t.Fatalf("the program on the terminal does not end; it shows:\n%s", term.text())
	case err != nil && !errors.As(err, &exit):
		term.t.Fatal(err)
	}
	return term.cmd.ProcessState.ExitCode()
}
