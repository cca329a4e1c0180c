package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/coracle-cri/coracle/e2e/fixture"
)

// linesPath is a file of the small image: linesCount lines of 100 bytes.
const (
	linesPath  = "/lines"
	linesCount = 80000
)

// helloImage is busybox, and a file of lines.
func helloImage() (v1.Image, error) {
	image, err := fixture.Busybox()
	if err != nil {
		return nil, err
	}
	w, err := fixture.NewLayerWriter(fixture.Gzip)
	if err != nil {
		return nil, err
	}
	line := strings.Repeat("0123456789", 9) + "012345678\n"
	if err := w.Add(fixture.Text(linesPath[1:], strings.Repeat(line, linesCount))); err != nil {
		return nil, err
	}
	layer, err := w.Layer()
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, layer)
}

// pauseImage is for the peer's sandboxes: a process that waits, and that is not taken for one of the workload.
func pauseImage() (v1.Image, error) {
	image, err := fixture.Busybox()
	if err != nil {
		return nil, err
	}
	return mutate.Config(image, v1.Config{Cmd: []string{"/bin/busybox", "sleep", "2147483647"}})
}

// usrImage is an image of layers, each of about size bytes as it is sent, that hold what this machine has in /usr.
func usrImage(layers, size int) (v1.Image, error) {
	p := packer{size: size, count: layers}
	err := filepath.WalkDir("/usr", p.take)
	if err != nil && !errors.Is(err, fs.SkipAll) {
		return nil, err
	}
	if len(p.layers) < layers {
		return nil, fmt.Errorf("this machine's /usr does not fill %d layers of %d bytes", layers, size)
	}
	return fixture.Image(v1.Config{Cmd: []string{"/nothing"}}, p.layers...)
}

// packer fills one layer after another with the files that it is given.
type packer struct {
	size, count int
	layers      []*fixture.Layer
	w           *fixture.LayerWriter // the layer that is being filled
	made        map[string]bool      // directories in it
}

// take is a fs.WalkDirFunc. What cannot be read is left out, and what is very large.
func (p *packer) take(name string, d fs.DirEntry, err error) error {
	if err != nil || !d.Type().IsRegular() {
		return nil
	}
	info, err := d.Info()
	if err != nil || info.Size() > 8<<20 {
		return nil
	}
	body, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	if p.w == nil {
		if p.w, err = fixture.NewLayerWriter(fixture.Gzip); err != nil {
			return err
		}
		p.made = map[string]bool{}
	}
	if err := p.parents(path.Dir(name[1:])); err != nil {
		return err
	}
	file := fixture.File{Name: name[1:], Mode: int64(info.Mode().Perm()), Body: string(body), Type: tar.TypeReg}
	if err := p.w.Add(file); err != nil || p.w.Packed() < p.size {
		return err
	}
	layer, err := p.w.Layer()
	if err != nil {
		return err
	}
	p.layers, p.w = append(p.layers, layer), nil
	if len(p.layers) == p.count {
		return fs.SkipAll
	}
	return nil
}

func (p *packer) parents(dir string) error {
	if dir == "." || p.made[dir] {
		return nil
	}
	p.made[dir] = true
	if err := p.parents(path.Dir(dir)); err != nil {
		return err
	}
	return p.w.Add(fixture.Dir(dir))
}
