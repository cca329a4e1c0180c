package main

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
)

// plainCommand is a command without anything that a shell would have to read: no quotes, variables, operators.
var plainCommand = regexp.MustCompile(`^[A-Za-z0-9_./@%+:,-]+( [A-Za-z0-9_./=@%+:,-]+)*$`)

// sh becomes the file of a plain command, and busybox's shell for all else.
func sh(args []string) int {
	if len(args) == 3 && args[1] == "-c" && plainCommand.MatchString(args[2]) {
		words := strings.Fields(args[2])
		if file := find(words[0]); file != "" {
			return complainAsShell(args[0], words[0], syscall.Exec(file, words, os.Environ()))
		}
	}
	return complain("sh", syscall.Exec("/bin/busybox", args, os.Environ()))
}

// find looks a command up in the PATH: any file will do, since it is exec's affair to say that it may not be run.
// What is no file may be a builtin.
func find(command string) string {
	if file, err := exec.LookPath(command); err == nil {
		return file
	}
	if strings.Contains(command, "/") {
		return command
	}
	for _, dir := range strings.Split(os.Getenv("PATH"), ":") {
		if _, err := os.Stat(dir + "/" + command); err == nil {
			return dir + "/" + command
		}
	}
	return ""
}

// complainAsShell says why a command could not be executed, in the words of busybox's shell, and returns the code
// that POSIX has for it.
func complainAsShell(shell, command string, err error) int {
	reason, code := "not found", 127
	var number syscall.Errno
	if errors.As(err, &number) && number != syscall.ENOENT {
		// "permission denied" is "Permission denied" in the C library.
		reason, code = strings.ToUpper(number.Error()[:1])+number.Error()[1:], 126
	}
	_, _ = os.Stderr.WriteString(shell + ": " + command + ": " + reason + "\n")
	return code
}
