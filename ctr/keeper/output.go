package keeper

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// chunkSize is what one read(2) of a container's output takes at most: the size of a pipe.
const chunkSize = 64 << 10

// chunks are shared by all outputs: an output holds one only between a read and the end of its delivery, so that
// a quiet container costs no buffer.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }}

// output copies one stream of a container to the log and to the sinks of whoever is attached.
type output struct {
	src  *os.File
	done chan struct{} // closed when the stream has ended and its last line is written

	// passing is held from the read of a chunk until it is in the log: who holds it knows that nothing is on its way.
	passing  sync.Mutex
	format   formatter
	finished bool // the last line is written

	mu    sync.Mutex
	sinks map[*sink]struct{}
	ended bool
}

// newOutput takes src over. The goroutine is run's; close ends it.
func newOutput(src *os.File, stream string, log *logFile) *output {
	return &output{src: src, done: make(chan struct{}), sinks: map[*sink]struct{}{},
		format: formatter{stream: stream, flush: log.write}}
}

// run copies until every writer has closed the stream, or close.
func (o *output) run() {
	defer close(o.done)
	for {
		chunk, n := o.read()
		if chunk == nil {
			break
		}
		o.format.feed(time.Now(), (*chunk)[:n])
		o.deliver((*chunk)[:n])
		chunks.Put(chunk)
		o.passing.Unlock()
	}
	o.passing.Lock()
	o.format.finish(time.Now())
	o.finished = true
	o.passing.Unlock()
	o.endSinks()
}

// read waits for output and takes it, and holds passing where it has some. nil means the end: of the pipe, of the
// terminal (EIO when its last user has closed it), or of this side.
func (o *output) read() (chunk *[]byte, n int) {
	raw, err := o.src.SyscallConn()
	if err != nil {
		return nil, 0
	}
	err = raw.Read(func(fd uintptr) bool {
		buf := chunks.Get().(*[]byte)
		o.passing.Lock()
		for {
			var rerr error
			n, rerr = unix.Read(int(fd), *buf)
			if errors.Is(rerr, unix.EINTR) {
				continue
			}
			if rerr == nil && n > 0 {
				chunk = buf
				return true
			}
			o.passing.Unlock()
			chunks.Put(buf)
			return !errors.Is(rerr, unix.EAGAIN)
		}
	})
	if err != nil && chunk == nil {
		return nil, 0
	}
	return chunk, n
}

func (o *output) deliver(data []byte) {
	o.mu.Lock()
	sinks := make([]*sink, 0, len(o.sinks))
	for s := range o.sinks {
		sinks = append(sinks, s)
	}
	o.mu.Unlock()
	for _, s := range sinks {
		s.put(data)
	}
}

// attach adds a sink; one that comes after the end of the stream is ended at once.
func (o *output) attach(s *sink) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		s.end()
		return
	}
	o.sinks[s] = struct{}{}
}

func (o *output) detach(s *sink) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.sinks, s)
}

func (o *output) endSinks() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	for s := range o.sinks {
		s.end()
	}
}

// drained waits for the end of the stream, for limit at most.
func (o *output) drained(limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-o.done:
	case <-timer.C:
	}
}

// close gives the stream up and waits for run. Writers that are left get EPIPE.
func (o *output) close() {
	_ = o.src.Close() // read side: nothing to lose
	<-o.done
}
