package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// blobRetries is how often in a row a blob's connection may end without having brought waits.least. What the attempts may
// take in all is a matter of patience.
const blobRetries = 5

// blobReader reads a blob from a registry and goes on where it was when the connection is cut. It is used by one
// reader; Abort may be called from another goroutine.
type blobReader struct {
	from    *remote
	digest  string
	size    int64
	ctx     context.Context
	end     context.CancelCauseFunc
	body    io.ReadCloser // nil: to be opened at off
	off     int64
	fresh   int       // bytes since the last progress
	idle    int       // attempts since then
	again   int       // attempts that began with what was had before
	opened  time.Time // the last of them
	refused bool      // the pause before the next: there is none
	retries int
}

// blob opens a blob of a known size. Its digest is for the caller to check.
func (r *remote) blob(ctx context.Context, digest string, size int64) (*blobReader, error) {
	b := &blobReader{from: r, digest: digest, size: size, retries: blobRetries}
	ctx, end := context.WithCancelCause(context.WithValue(ctx, layerKey{}, &b.refused))
	b.ctx, b.end = ctx, end
	if r.at.mirror {
		b.retries = mirrorRetries
	}
	if err := b.open(); err != nil {
		end(nil)
		return nil, err
	}
	return b, nil
}

// open asks for what is still missing.
func (b *blobReader) open() error {
	what := "get blob " + b.digest
	b.opened = time.Now()
	req, err := http.NewRequestWithContext(b.ctx, http.MethodGet, b.from.url("blobs", b.digest), nil)
	if err != nil {
		return fmt.Errorf("%s: %w", b.from.at, err)
	}
	if b.off > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", b.off, b.size-1))
	}
	resp, err := b.from.client.Do(req)
	if err != nil {
		return b.from.failed(what, errors.Join(err, context.Cause(b.ctx)))
	}
	skip, err := b.checkResponse(resp)
	if err == nil {
		if err = b.skip(resp.Body, skip); err == nil {
			b.body = resp.Body
			return nil
		}
	}
	resp.Body.Close()
	return b.from.failed(what, errors.Join(err, context.Cause(b.ctx)))
}

// skip reads what was had before. It takes its time as the first time; a server that has it read again and again is paid
// for blobRetries times.
func (b *blobReader) skip(from io.Reader, bytes int64) error {
	if bytes > 0 {
		b.again++
	}
	to := io.Discard
	if b.again <= blobRetries {
		to = b.from.patience
	}
	_, err := io.CopyN(to, from, bytes)
	return err
}

// checkResponse returns how much of the body was had before: a server that does not know ranges sends it all.
func (b *blobReader) checkResponse(resp *http.Response) (skip int64, err error) {
	if b.off > 0 && resp.StatusCode == http.StatusPartialContent {
		var first, last int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &first, &last); err != nil || first > b.off {
			return 0, fmt.Errorf("%w: answer to a range request has range %.60q", ErrUnavailable, resp.Header.Get("Content-Range"))
		}
		return b.off - first, nil
	}
	if err := checkStatus(resp); err != nil {
		return 0, err
	}
	if resp.ContentLength >= 0 && b.size >= 0 && resp.ContentLength != b.size {
		return 0, fmt.Errorf("%w: it has %d bytes, the manifest says %d", ErrDigest, resp.ContentLength, b.size)
	}
	return b.off, nil
}

func (b *blobReader) Read(p []byte) (int, error) {
	for {
		if b.body == nil {
			if err := b.reopen(); err != nil {
				if b.off > 0 && b.idle < b.retries && !b.refused && b.ctx.Err() == nil && errors.Is(err, ErrUnavailable) && b.from.patience.gone() == nil {
					continue // it was there a moment ago
				}
				return 0, err
			}
		}
		n, err := b.body.Read(p)
		b.progress(n)
		switch {
		case err == nil, err == io.EOF && b.off >= b.size:
			return n, err
		case b.ctx.Err() != nil:
			return n, context.Cause(b.ctx)
		}
		// Cut: a body that ends early, or breaks. What came of it is good.
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		b.drop()
		if b.idle >= b.retries || b.from.patience.gone() != nil {
			return n, b.from.failed(fmt.Sprintf("get blob %s: cut after %d of %d bytes", b.digest, b.off, b.size), err)
		}
		if n > 0 {
			return n, nil
		}
	}
}

func (b *blobReader) progress(n int) {
	b.off += int64(n)
	if b.fresh += n; b.fresh >= b.from.patience.waits.least {
		b.fresh, b.idle = 0, 0
	}
	b.from.patience.rewarded(n)
	if b.off >= b.size && b.off-int64(n) < b.size {
		b.from.patience.completed()
	}
}

// reopen waits and asks for the rest. The transport has its own retries for answers that are errors.
func (b *blobReader) reopen() error {
	if b.idle > 0 {
		wait := b.from.patience.waits.step(b.idle-1) - time.Since(b.opened) // an attempt that took its time was a pause itself
		if !b.from.patience.grants(wait) {
			b.refused = true
			return b.from.failed("get blob "+b.digest, errStall)
		}
		if err := b.from.patience.pause(b.ctx, wait); err != nil {
			return err
		}
	}
	b.idle++
	return b.open()
}

func (b *blobReader) drop() {
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
}

// Abort makes a Read under way return.
func (b *blobReader) Abort() { b.end(context.Canceled) }

// Close must not run beside Read.
func (b *blobReader) Close() error {
	b.end(nil)
	b.drop()
	return nil
}
