package images

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// archive is a tar file of which the entries can be read in any order. Entries are never written anywhere under
// the names that they have: only found by them.
type archive struct {
	file    *os.File
	owned   bool
	entries map[string]*io.SectionReader
	links   map[string]string // name → the name that it stands for
}

// openArchive indexes an archive, which it decompresses into an unnamed file where needed.
func (s *Store) openArchive(ctx context.Context, r io.Reader) (*archive, error) {
	a := &archive{entries: map[string]*io.SectionReader{}, links: map[string]string{}}
	f, isFile := r.(*os.File)
	if !isFile || !plainFile(f) {
		var err error
		if f, err = s.spool(ctx, r); err != nil {
			return nil, err
		}
		a.owned = true
	}
	a.file = f
	if err := a.index(ctx, s.cfg.MaxLayerEntries); err != nil {
		return nil, errors.Join(err, a.close())
	}
	return a, nil
}

func (a *archive) close() error {
	if !a.owned {
		return nil
	}
	return a.file.Close()
}

// plainFile tells whether f can be read in place: regular, from its beginning, and not compressed.
func plainFile(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	if pos, err := f.Seek(0, io.SeekCurrent); err != nil || pos != 0 {
		return false
	}
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil {
		return false
	}
	return compression(magic) == ""
}

// spool writes what r has, decompressed, to a file without a name: it is gone with its descriptor.
func (s *Store) spool(ctx context.Context, r io.Reader) (*os.File, error) {
	plain, err := decompress(&contextReader{ctx: ctx, r: r})
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	f, err := s.unnamedFile()
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(f, plain); err != nil {
		return nil, errors.Join(fmt.Errorf("read archive: %w", err), f.Close())
	}
	return f, nil
}

func (s *Store) unnamedFile() (*os.File, error) {
	fd, err := unix.Open(s.path("tmp"), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), "archive"), nil
	}
	f, err := os.CreateTemp(s.path("tmp"), "archive-*") // a filesystem without O_TMPFILE
	if err != nil {
		return nil, fmt.Errorf("make temporary file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("make temporary file: %w", err), f.Close())
	}
	return f, nil
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

func (a *archive) index(ctx context.Context, maxEntries int) error {
	info, err := a.file.Stat()
	if err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	all := io.NewSectionReader(a.file, 0, info.Size())
	tr := tar.NewReader(all)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !(errors.Is(err, tar.ErrInsecurePath) && h != nil) {
			return fmt.Errorf("%w: read archive: %w", ErrInvalid, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if n > maxEntries {
			return tooManyEntries(int64(maxEntries))
		}
		if len(h.Name) >= maxPath || len(h.Linkname) >= maxPath {
			continue // nothing of either format has such a name
		}
		name := cleanName(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The tar reader stands exactly at the entry's content: it reads whole blocks, and seeks.
			off, err := all.Seek(0, io.SeekCurrent)
			if err != nil {
				return fmt.Errorf("read archive: %w", err)
			}
			a.entries[name] = io.NewSectionReader(a.file, off, h.Size)
		case tar.TypeSymlink: // docker save of old: one layer under several names
			a.links[name] = cleanName(path.Join(path.Dir(name), h.Linkname))
		case tar.TypeLink:
			a.links[name] = cleanName(h.Linkname)
		}
	}
}

func (a *archive) find(name string) *io.SectionReader {
	name = cleanName(name)
	for range maxLinks {
		if e := a.entries[name]; e != nil {
			return e
		}
		next, ok := a.links[name]
		if !ok {
			return nil
		}
		name = next
	}
	return nil
}

func (a *archive) has(name string) bool { return a.find(name) != nil }

// open returns an entry's content; readers of one entry do not disturb each other.
func (a *archive) open(name string) (*io.SectionReader, error) {
	e := a.find(name)
	if e == nil {
		return nil, fmt.Errorf("%w: the archive has no %.200q", ErrInvalid, name)
	}
	return io.NewSectionReader(e, 0, e.Size()), nil
}

func (a *archive) read(name string) ([]byte, error) {
	e, err := a.open(name)
	if err != nil {
		return nil, err
	}
	if e.Size() > manifestLimit {
		return nil, fmt.Errorf("%w: %.200q is larger than %d bytes", ErrRefused, name, manifestLimit)
	}
	raw, err := io.ReadAll(e)
	if err != nil {
		return nil, fmt.Errorf("read %.200q: %w", name, err)
	}
	return raw, nil
}

// document makes an archive the source of an OCI image's manifests and configuration.
func (a *archive) document(_ context.Context, _, id string) ([]byte, string, error) {
	raw, err := a.read(blobPath(id))
	return raw, "", err
}

// blobPath is where an OCI layout keeps a blob.
func blobPath(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

const (
	compressedGzip = "gzip"
	compressedZstd = "zstd"
)

// compression tells how a stream is compressed by its first four bytes, "" where it is not. Zstandard's may begin
// with a frame to be skipped, as zstd:chunked does.
func compression(magic []byte) string {
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return compressedGzip
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return compressedZstd
	case len(magic) >= 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:4], []byte{0x2a, 0x4d, 0x18}):
		return compressedZstd
	}
	return ""
}

// peek returns the first bytes of a stream without taking them.
func peek(br *bufio.Reader) ([]byte, error) {
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	return magic, nil
}
