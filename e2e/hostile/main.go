package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// attempt returns a detail where it got through, and an error where it was kept.
type attempt struct {
	name string
	try  func() (string, error)
}

// The environment says what there is to be found on the host.
const (
	hostPortEnv   = "HOSTILE_HOST_PORT"   // something listens there on the host's 127.0.0.1
	streamPortEnv = "HOSTILE_STREAM_PORT" // the streaming server's
	abstractEnv   = "HOSTILE_ABSTRACT"    // name of an abstract unix socket of the host's network namespace
	keyEnv        = "HOSTILE_KEY"         // description of a key in the user keyring of the host
	shmEnv        = "HOSTILE_SHM"         // id of a shared memory segment of the host
	stateEnv      = "HOSTILE_STATE"       // a directory of the node's
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "bomb":
			ids := 1
			if len(os.Args) > 2 {
				ids, _ = strconv.Atoi(os.Args[2])
			}
			bomb(max(ids, 1))
			return
		case "overwrite":
			overwrite()
			return
		case "greet":
			if err := greet(os.Args[2]); err != nil {
				fmt.Println("kept", err)
				return
			}
			fmt.Println("through")
			return
		case "reach":
			reach(os.Args[2:])
			return
		case "exchange":
			exchange(os.Args[2])
			return
		}
	}
	for _, a := range slices.Concat(descriptors(), processes(), kernel(), memory(), network(), files()) {
		if len(os.Args) > 1 && !slices.Contains(os.Args[1:], a.name) {
			continue
		}
		detail, err := a.try()
		result := "through"
		if err != nil {
			result, detail = "kept", err.Error()
		}
		fmt.Printf("%s\t%s\t%s\n", a.name, result, strings.ReplaceAll(detail, "\n", " "))
	}
	fmt.Println("end")
}

var errAbsent = errors.New("there is none")

// given is the value of a variable that the test sets.
func given(name string) (string, error) {
	if v := os.Getenv(name); v != "" {
		return v, nil
	}
	return "", fmt.Errorf("%s is not set: %w", name, errAbsent)
}
