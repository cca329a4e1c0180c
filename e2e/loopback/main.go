// Command loopback is the registry of the demo and the benchmark: it serves, on a free port of 127.0.0.1, one small
// image that it packs on the spot, prints the image's name, and ends with its standard input.
//
// With -remove DIR it removes a directory tree with files of the caller's subordinate ids instead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/coracle-cri/coracle/e2e/box"
	"github.com/coracle-cri/coracle/e2e/fixture"
)

func main() {
	box.Init()
	remove := flag.String("remove", "", "remove this directory instead")
	flag.Parse()
	err := error(nil)
	if *remove != "" {
		err = box.RemoveAll(*remove)
	} else {
		err = serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
		os.Exit(1)
	}
}

func serve() (err error) {
	image, err := fixture.Busybox()
	if err != nil {
		return err
	}
	index, err := fixture.Index(image)
	if err != nil {
		return err
	}
	registry, err := fixture.StartRegistry(fixture.RegistryOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	if _, err := registry.Push(context.Background(), "demo/hello:1", index); err != nil {
		return err
	}
	fmt.Println(registry.Addr + "/demo/hello:1")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
