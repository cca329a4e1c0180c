package images

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

const (
	streamBuffer = 256 << 10
	// zstdMaxWindow is what `zstd --ultra --long=27` needs; a larger window would only serve to eat memory.
	zstdMaxWindow = 128 << 20
)

// layerWant is what a layer must turn out to be.
type layerWant struct {
	DiffID string // digest of the uncompressed tar
	Digest string // digest of the blob; "" where there is none to check (docker archives)
	Size   int64  // of the blob; -1 where it is not known
}

// unpackLayer turns a layer's blob into a directory tree at dir/diff and the record at dir/layer.json. It streams:
// the blob is never on disk. What is in dir is worth nothing until it returns without error, since both digests
// can only be known at the end.
func (s *Store) unpackLayer(ctx context.Context, dir string, want layerWant, within *room, blob io.Reader) (_ *layerRecord, err error) {
	sh := &share{of: within}
	defer func() {
		if err != nil {
			sh.giveBack()
		}
	}()
	in, err := newVerifier(blob, want.Digest, want.Size, s.log)
	if err != nil {
		return nil, err
	}
	diff := filepath.Join(dir, "diff")
	if err := os.Mkdir(diff, 0o755); err != nil {
		return nil, fmt.Errorf("unpack layer: %w", err)
	}
	u, err := newUnpacker(ctx, s, diff, sh)
	if err != nil {
		return nil, err
	}
	err = unpackStream(u, in, want.DiffID)
	if closeErr := u.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, err
	}
	rec := u.record()
	rec.Version, rec.DiffID, rec.BootID, rec.Made = recordVersion, want.DiffID, s.boot, now()
	return rec, nil
}

// unpackStream runs blob → digest → decompress → diffID → tar → files. The diffID is computed in a goroutine of
// its own, and the decompressors read ahead in theirs, so one large layer uses more than one CPU.
func unpackStream(u *unpacker, in *verifier, diffID string) (err error) {
	defer func() {
		if err == nil {
			return
		}
		// A cut connection surfaces as whatever the decompressor makes of it: name the cause instead.
		if cause := in.abort(); cause != nil {
			err = cause
		}
	}()
	plain, err := decompress(in)
	if err != nil {
		return err
	}
	sum, err := newHashTee(&limitReader{ctx: u.ctx, r: plain, share: u.share}, diffID, in.log)
	if err != nil {
		return errors.Join(err, plain.Close())
	}
	defer func() {
		if err != nil {
			if cause := in.abort(); cause != nil {
				err = cause
			}
		}
		plain.Close() // waits for its goroutine; all there is to know was read before
	}()
	tarStream := bufio.NewReaderSize(sum, streamBuffer)
	err = guarded(in.log, func() error { // here already, so that all that was begun is ended
		if err := u.unpack(tarStream); err != nil {
			return err
		}
		// What follows the end of the archive is part of both digests.
		if _, err := io.Copy(io.Discard, tarStream); err != nil {
			return corrupt("decompress layer", err)
		}
		return nil
	})
	got, sumErr := sum.finish()
	if err == nil {
		err = sumErr
	}
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if err := in.check(); err != nil {
		return err
	}
	if got != diffID {
		return fmt.Errorf("%w: layer unpacks to %s, the image's configuration says %s", ErrDigest, got, diffID)
	}
	return nil
}

// decompress tells the compression by the first bytes: media types are wrong often enough, and the diffID
// decides anyhow.
func decompress(in io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(in, streamBuffer)
	magic, err := peek(br)
	if err != nil {
		return nil, err
	}
	switch compression(magic) {
	case compressedGzip:
		zr, err := pgzip.NewReaderN(br, streamBuffer, 8)
		if err != nil {
			return nil, corrupt("decompress layer", err)
		}
		return zr, nil
	case compressedZstd:
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(2), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdMaxWindow))
		if err != nil {
			return nil, corrupt("decompress layer", err)
		}
		return zr.IOReadCloser(), nil
	default:
		return io.NopCloser(br), nil
	}
}

// verifier passes a blob through while it counts and hashes it.
type verifier struct {
	log  *slog.Logger
	r    io.Reader
	hash hash.Hash // nil: nothing to check
	want string
	size int64 // -1: unknown
	n    int64

	mu      sync.Mutex // the decompressor's goroutine reads while ours may give up
	err     error      // what reading r failed with, before it was aborted
	aborted bool
}

// aborter is a blob whose reader can be woken from a stalled network.
type aborter interface{ Abort() }

// abort makes a read under way return, and returns the error that reading met before.
func (v *verifier) abort() error {
	v.mu.Lock()
	v.aborted = true
	err := v.err
	v.mu.Unlock()
	if a, ok := v.r.(aborter); ok {
		a.Abort()
	}
	return err
}

func (v *verifier) failed(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err == nil && !v.aborted {
		v.err = err
	}
}

func newVerifier(r io.Reader, digest string, size int64, log *slog.Logger) (*verifier, error) {
	v := &verifier{log: log, r: r, want: digest, size: size}
	if digest == "" {
		return v, nil
	}
	h, err := hasher(digest)
	v.hash = h
	return v, err
}

func (v *verifier) Read(p []byte) (n int, err error) {
	err = guarded(v.log, func() (err error) {
		if n, err = v.r.Read(p); v.hash != nil {
			v.hash.Write(p[:n])
		}
		return err
	})
	v.n += int64(n)
	if v.size >= 0 && v.n > v.size {
		err = fmt.Errorf("%w: blob %s is longer than the %d bytes that its manifest says", ErrDigest, v.want, v.size)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		v.failed(err)
	}
	return n, err
}

// check is called once everything was read.
func (v *verifier) check() error {
	if v.size >= 0 && v.n != v.size {
		return fmt.Errorf("%w: blob %s has %d bytes, its manifest says %d", ErrDigest, v.want, v.n, v.size)
	}
	if v.hash == nil {
		return nil
	}
	if got := digestOf(v.want, v.hash); got != v.want {
		return fmt.Errorf("%w: blob has digest %s, want %s", ErrDigest, got, v.want)
	}
	return nil
}

// hashTee hashes what is read through it, one buffer behind the reader.
type hashTee struct {
	r    io.Reader
	want string
	hash hash.Hash
	full chan []byte
	free chan []byte
	done chan struct{}
	err  error // written before done is closed
}

func newHashTee(r io.Reader, digest string, log *slog.Logger) (*hashTee, error) {
	h, err := hasher(digest)
	if err != nil {
		return nil, err
	}
	const buffers = 4
	t := &hashTee{r: r, want: digest, hash: h, full: make(chan []byte, buffers), free: make(chan []byte, buffers), done: make(chan struct{})}
	for range buffers {
		t.free <- make([]byte, 0, streamBuffer)
	}
	go func() {
		defer close(t.done)
		t.err = guarded(log, func() error {
			for b := range t.full {
				t.hash.Write(b)
				t.free <- b[:0]
			}
			return nil
		})
		for b := range t.full { // after a panic: who reads is not to wait for ever
			t.free <- b[:0]
		}
	}()
	return t, nil
}

func (t *hashTee) Read(p []byte) (int, error) {
	n, err := t.r.Read(p[:min(len(p), streamBuffer)])
	if n > 0 {
		t.full <- append(<-t.free, p[:n]...)
	}
	return n, err
}

// finish ends the goroutine and returns the digest of all that was read. Call it exactly once.
func (t *hashTee) finish() (string, error) {
	close(t.full)
	<-t.done
	if t.err != nil {
		return "", t.err
	}
	return digestOf(t.want, t.hash), nil
}

// limitReader fails, where io.LimitReader ends, when there is more than the image may have. It ends with its context, too: what a
// small blob unpacks to may take long, and needs no more of the network.
type limitReader struct {
	ctx   context.Context
	r     io.Reader
	share *share
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.ctx.Err() != nil {
		return 0, context.Cause(l.ctx)
	}
	n, err := l.r.Read(p)
	if err := l.share.readMore(int64(n)); err != nil {
		return 0, err
	}
	return n, err
}

// hasher returns the hash that digest was made with.
func hasher(digest string) (hash.Hash, error) {
	d, err := v1.NewHash(digest)
	if err != nil {
		return nil, fmt.Errorf("%w: digest %.100q", ErrInvalid, digest)
	}
	h, err := v1.Hasher(d.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("%w: digest %.100q: %w", ErrInvalid, digest, err)
	}
	return h, nil
}

// digestOf is the digest that h arrived at, with the algorithm of like.
func digestOf(like string, h hash.Hash) string {
	d, err := v1.NewHash(like)
	if err != nil {
		return ""
	}
	return d.Algorithm + ":" + hex.EncodeToString(h.Sum(nil))
}
