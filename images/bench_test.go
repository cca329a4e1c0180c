package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// realLayer packs files of this machine's /usr, of the given total size.
func realLayer(b *testing.B, from string, size int64) (raw []byte, files int) {
	b.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || int64(buf.Len()) > size {
			return filepath.SkipDir
		}
		info, err := d.Info()
		if err != nil || !d.IsDir() && !info.Mode().IsRegular() || info.Size() > size/2 {
			return nil
		}
		h, err := tar.FileInfoHeader(info, "")
		if err != nil {
			return err
		}
		h.Name, h.Uid, h.Gid = strings.TrimPrefix(path, "/"), 0, 0
		if d.IsDir() {
			return tw.WriteHeader(h)
		}
		body, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		h.Size = int64(len(body))
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		files++
		_, err = io.Copy(tw, bytes.NewReader(body))
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes(), files
}

// BenchmarkPull pulls from a registry in this process: one large layer, and the same data in six.
func BenchmarkPull(b *testing.B) {
	const size = 360 << 20
	raw, files := realLayer(b, "/usr", size)
	for _, compressed := range []string{compressedGzip, compressedZstd} {
		l := compressLayer(b, compressed, raw)
		benchmarkPull(b, fmt.Sprintf("one %s layer of %d MB, %d MB and %d files unpacked", compressed, len(l.blob)>>20, len(raw)>>20, files), l)
	}
	var layers []*testLayer
	total := 0
	for _, dir := range []string{"/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/share", "/usr/lib/gcc", "/usr/include", "/usr/local"} {
		raw, _ := realLayer(b, dir, size/6)
		layers = append(layers, compressLayer(b, compressedGzip, raw))
		total += len(layers[len(layers)-1].blob)
	}
	benchmarkPull(b, fmt.Sprintf("six gzip layers of %d MB", total>>20), layers...)
}

func benchmarkPull(b *testing.B, name string, layers ...*testLayer) {
	b.Run(name, func(b *testing.B) {
		h, s := newHub(b), openStore(b, Config{})
		h.push(b, "large:1", imageOf(b, layers...))
		for b.Loop() {
			pull(b, s, h.host+"/large:1")
			b.StopTimer()
			if err := s.Remove(h.host + "/large:1"); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}

// BenchmarkMount mounts and unmounts a root filesystem.
func BenchmarkMount(b *testing.B) {
	h, s := newHub(b), openStore(b, Config{})
	var layers []*testLayer
	for i := range 10 {
		layers = append(layers, gzipLayer(b, file(fmt.Sprint(i), "")))
	}
	h.push(b, "app:1", imageOf(b, layers...))
	img := pull(b, s, h.host+"/app:1")
	for b.Loop() {
		mount(b, s, "c", img.ID)
		if err := s.UnmountRootfs("c"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReplacedDirectories: 100,000 directories, and 2,000 times one that is replaced by a file and back.
func BenchmarkReplacedDirectories(b *testing.B) {
	var entries []entry
	for i := range 100_000 {
		entries = append(entries, dir(fmt.Sprintf("d%d", i), 0o755))
	}
	for range 2000 {
		entries = append(entries, dir("x", 0o755), file("x", ""))
	}
	raw := archiveOf(b, entries...)
	s := openStore(b, Config{})
	for b.Loop() {
		if _, err := s.unpackLayer(context.Background(), b.TempDir(), layerWant{DiffID: sum(raw), Size: -1}, s.newRoom(), bytes.NewReader(raw)); err != nil {
			b.Fatal(err)
		}
	}
}
