package images

import "io"

// readAhead reads from r in a goroutine of its own, some buffers ahead of its reader: taking a blob from its socket and
// hashing it is a seventh of the work of the goroutine that inflates it, and the one that a single layer waits for.
type readAhead struct {
	full chan filled
	free chan []byte
	quit chan struct{}
	done chan struct{}

	rest filled // what was received and not read yet
	buf  []byte // that rest is in
}

// filled is what one read brought.
type filled struct {
	data []byte
	err  error
}

const (
	aheadBuffers = 4
	aheadSize    = 128 << 10
)

// newReadAhead starts to read. The caller calls close, after whatever makes a read of r under way return.
func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{full: make(chan filled, aheadBuffers), free: make(chan []byte, aheadBuffers), quit: make(chan struct{}), done: make(chan struct{})}
	for range aheadBuffers {
		a.free <- nil // made when it is first needed: small layers need one
	}
	go a.run(r)
	return a
}

func (a *readAhead) run(r io.Reader) {
	defer close(a.done)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.quit:
			return
		}
		if buf == nil {
			buf = make([]byte, aheadSize)
		}
		n, err := r.Read(buf)
		a.full <- filled{buf[:n], err} // has room for every buffer
		if err != nil {
			return
		}
	}
}

// Read returns r's error once everything before it was read, and again and again.
func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.rest.data) == 0 {
		if a.rest.err != nil {
			return 0, a.rest.err
		}
		if a.buf != nil {
			a.free <- a.buf // has room for every buffer
		}
		a.rest = <-a.full
		a.buf = a.rest.data[:cap(a.rest.data)]
	}
	n := copy(p, a.rest.data)
	a.rest.data = a.rest.data[n:]
	return n, nil
}

// close waits for the goroutine.
func (a *readAhead) close() {
	close(a.quit)
	<-a.done
}
