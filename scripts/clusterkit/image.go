package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// runImage writes a docker archive to standard output: one static program, which is the image's entry point.
func runImage(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	ref := flags.String("ref", "", "name of the image")
	program := flags.String("program", "", "the program")
	if err := flags.Parse(args); err != nil {
		return err
	}
	tag, err := name.NewTag(*ref)
	if err != nil {
		return err
	}
	image, err := programImage(*program)
	if err != nil {
		return fmt.Errorf("pack %s: %w", *program, err)
	}
	return tarball.Write(tag, image, os.Stdout)
}

func programImage(program string) (v1.Image, error) {
	body, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	base := filepath.Base(program)
	err = w.WriteHeader(&tar.Header{Name: base, Mode: 0o755, Size: int64(len(body)), Typeflag: tar.TypeReg})
	if err == nil {
		_, err = w.Write(body)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	return mutate.Config(image, v1.Config{Entrypoint: []string{"/" + base}})
}
