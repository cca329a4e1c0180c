//go:build faults

package crash

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// dirEnv names the directory of three files:
//
//	trace  one line for each point that is passed, where the file is there
//	armed  lines "NAME N": the daemon is to die when it passes NAME for the Nth time. The first line counts; it is taken
//	       out when that happens, so that the daemon that comes back is bound by the next
//	fired  the lines that were taken out
const dirEnv = "CORACLE_CRASH"

// dir is "" in every process but the daemon.
var dir = func() string {
	if len(os.Args) < 2 || os.Args[1] != "daemon" {
		return ""
	}
	return os.Getenv(dirEnv)
}()

var (
	mu     sync.Mutex // guards the rest, and makes the trace a sequence
	armed  string     // what the file said at the last point
	passed int        // how often that was passed
)

// Point is a place between two steps that change something.
func Point(name string) {
	if dir == "" {
		return
	}
	mu.Lock()
	defer mu.Unlock()
	appendLine("trace", name, 0)
	raw, err := os.ReadFile(filepath.Join(dir, "armed"))
	if err != nil {
		return
	}
	if string(raw) != armed {
		armed, passed = string(raw), 0
	}
	line, rest, _ := strings.Cut(armed, "\n")
	var want string
	var nth int
	if _, err := fmt.Sscan(line, &want, &nth); err != nil || want != name {
		return
	}
	if passed++; passed < nth {
		return
	}
	die(line, rest)
}

// die holds mu: no other goroutine passes a point any more.
func die(line, rest string) {
	appendLine("fired", line, os.O_CREATE)
	path := filepath.Join(dir, "armed")
	if err := os.WriteFile(path+".new", []byte(rest), 0o600); err != nil {
		panic(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		panic(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		panic(err)
	}
	select {}
}

func appendLine(file, line string, create int) {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY|os.O_APPEND|create, 0o600)
	if err != nil {
		return // nobody wants it
	}
	defer f.Close()
	fmt.Fprintln(f, line)
}
