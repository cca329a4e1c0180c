package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// peerRegistry is where a runtime with a network of its own finds the registry: on loopback, as the others do.
const peerRegistry = "127.0.0.1:5000"

// The images, by repository and tag.
const (
	imageHello = "bench/hello:1"
	imagePause = "bench/pause:1"
	imageSix   = "bench/six:1" // 118 MB in six layers
	imageOne   = "bench/one:1" // one layer of 100 MB
)

// registryServer is one registry with all images, which every runtime reaches on its own loopback.
type registryServer struct{ *fixture.Registry }

func startRegistry(ctx context.Context, large bool) (*registryServer, error) {
	registry, err := fixture.StartRegistry(fixture.RegistryOptions{})
	if err != nil {
		return nil, err
	}
	r := &registryServer{registry}
	images := map[string]func() (v1.Image, error){imageHello: helloImage, imagePause: pauseImage}
	if large {
		images[imageSix] = func() (v1.Image, error) { return usrImage(6, 118_000_000/6) }
		images[imageOne] = func() (v1.Image, error) { return usrImage(1, 100_000_000) }
	}
	for name, build := range images {
		image, err := build()
		if err == nil {
			_, err = r.Push(ctx, name, image)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("image %s: %w", name, err), r.Close())
		}
	}
	return r, nil
}

// serveIn lets a runtime in a network of its own reach the registry: a helper listens there and hands the socket over.
func (r *registryServer) serveIn(n *node) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	cmd := n.inside("listen", peerRegistry)
	cmd.Stdin, cmd.Stderr = theirs, os.Stderr
	err = cmd.Run()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("listen in the network of %s: %w", n.name, err)
	}
	rights := make([]byte, unix.CmsgSpace(4))
	_, got, _, _, err := unix.Recvmsg(int(ours.Fd()), make([]byte, 1), rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return fmt.Errorf("receive socket: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:got])
	if err != nil || len(messages) != 1 {
		return errors.Join(errors.New("receive socket: none came"), err)
	}
	sockets, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(sockets) != 1 {
		return errors.Join(errors.New("receive socket: none came"), err)
	}
	f := os.NewFile(uintptr(sockets[0]), "registry")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	r.ServeAlso(l)
	return nil
}

// listenCommand listens at an address and sends the socket over its standard input: bench listen HOST:PORT.
func listenCommand(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	return unix.Sendmsg(0, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0)
}
