package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestMain is the program itself where it is called by one of its names.
func TestMain(m *testing.M) {
	if run, ok := programs[filepath.Base(os.Args[0])]; ok {
		os.Exit(run(os.Args))
	}
	os.Exit(m.Run())
}

// call runs the program by a name, with a PATH of one directory.
func call(t *testing.T, path string, args ...string) (out, errs string, code int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Args, cmd.Env = args, []string{"PATH=" + path}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

// TestShellExecutesFiles: what busybox's shell would run inside itself is a file here, which may be masked.
func TestShellExecutesFiles(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"works": 0o755, "masked": 0o644} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("#!/bin/sh\necho \"$0 $*\"\nexit 3\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	works := filepath.Join(dir, "works")
	for _, c := range []struct {
		script, out, errs string
		code              int
	}{
		{"works -a b=c", works + " -a b=c\n", "", 3},
		{works, works + " \n", "", 3},
		// The words of busybox's shell, which a spec of critest's compares.
		{"masked", "", "/bin/sh: masked: Permission denied\n", 126},
		{dir + "/none", "", "/bin/sh: " + dir + "/none: not found\n", 127},
	} {
		out, errs, code := call(t, dir, "/bin/sh", "-c", c.script)
		if out != c.out || errs != c.errs || code != c.code {
			t.Errorf("%s: %q, %q, exit code %d; want %q, %q, %d", c.script, out, errs, code, c.out, c.errs, c.code)
		}
	}
}

// TestShellLeavesLanguageToBusybox: only a plain command may be taken apart by spaces.
func TestShellLeavesLanguageToBusybox(t *testing.T) {
	for _, script := range []string{"a; b", "a && b", "a 'b c'", "echo $HOME", "A=b c", "a >b", "a*", "a\nb", "", " a", "~/a", `a "b"`, "a|b", "(a)"} {
		if plainCommand.MatchString(script) {
			t.Errorf("%q would be executed without a shell", script)
		}
	}
	for _, script := range []string{"top", "ls -la /a_b", "sleep 4321", "mount --bind /etc /tmp/x", "env A=b c"} {
		if !plainCommand.MatchString(script) {
			t.Errorf("%q would be busybox's", script)
		}
	}
}

func TestPgrep(t *testing.T) {
	if out, _, code := call(t, "", "pgrep", "no-such-process"); out != "" || code != 1 {
		t.Errorf("pgrep of a name that nobody has: %q, exit code %d", out, code)
	}
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	if out, _, code := call(t, "", "pgrep", string(bytes.TrimSpace(comm))); out == "" || code != 0 {
		t.Errorf("pgrep of this test's name: %q, exit code %d", out, code)
	}
}
