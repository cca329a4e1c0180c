// Command floor measures what the kernel alone asks for a container: a process in namespaces of its own, one overlay
// mount, pivot_root and execve, without a line of a runtime between them. Run it where containers are made:
//
//	coracle enter -- floor -program /bin/busybox-static
package main

// #include <stdlib.h>
// #include "floor.h"
import "C"

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
	"unsafe"
)

var steps = []string{"clone into new namespaces", "overlay mount", "pivot_root", "execve", "all"}

func main() {
	program := flag.String("program", "/bin/true", "a static program that ends by itself with 0")
	count := flag.Int("count", 100, "how often")
	network := flag.Bool("network", false, "make a network namespace each time, which a pod has before its containers")
	flag.Parse()
	if err := run(*program, *count, *network); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func run(program string, count int, network bool) error {
	dir, err := os.MkdirTemp("", "floor-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, sub := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	raw, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "lower", "true"), raw, 0o755); err != nil {
		return err
	}
	paths := C.struct_floor_paths{merged: C.CString(filepath.Join(dir, "merged")), program: C.CString("/true"),
		overlay: C.CString(fmt.Sprintf("userxattr,lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir))}
	if !network {
		paths.sandbox = 1
	}
	defer C.free(unsafe.Pointer(paths.merged))
	defer C.free(unsafe.Pointer(paths.program))
	defer C.free(unsafe.Pointer(paths.overlay))
	took := make([][]time.Duration, len(steps))
	for range count {
		var ns [4]C.int64_t
		if errno := C.floor_once(&paths, &ns[0]); errno != 0 {
			return fmt.Errorf("make a container: %w", syscall.Errno(errno))
		}
		var all time.Duration
		for i, n := range ns {
			took[i] = append(took[i], time.Duration(n))
			all += time.Duration(n)
		}
		took[len(ns)] = append(took[len(ns)], all)
	}
	fmt.Printf("%d times; milliseconds: median, least\n", count)
	for i, step := range steps {
		slices.Sort(took[i])
		fmt.Printf("  %-26s %6.2f %6.2f\n", step, ms(took[i][count/2]), ms(took[i][0]))
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
