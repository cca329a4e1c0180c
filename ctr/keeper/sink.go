package keeper

import (
	"errors"
	"os"
	"sync"
	"time"
)

const (
	// sinkSize bounds what waits in memory for one attached reader of one stream.
	sinkSize = 1 << 20

	// batchSize is what one write(2) to a reader carries, and so the progress that sinkPatience asks for.
	batchSize = 32 << 10

	// sinkPatience bounds how long a full sink holds the container's output up before the reader is given up: a
	// reader that goes on reading gets every byte, one that has stopped costs the log this long, once.
	sinkPatience = 250 * time.Millisecond
)

var errSlowReader = errors.New("the reader is too slow: it was detached so that the container's log goes on")

// sink writes one stream to one attached reader. put is called by one goroutine; run is another's.
type sink struct {
	dst  *os.File
	wake chan struct{} // capacity 1: there is data, or the end
	room chan struct{} // capacity 1: the data was taken
	done chan struct{} // closed when run has ended

	mu    sync.Mutex
	data  []byte
	ended bool  // no more data will come
	err   error // why the reader gets no more
}

// newSink takes dst over, which must be pollable. The caller runs run.
func newSink(dst *os.File) *sink {
	return &sink{dst: dst, wake: make(chan struct{}, 1), room: make(chan struct{}, 1), done: make(chan struct{})}
}

// put queues data, or gives the reader up when there is no room for it within sinkPatience.
func (s *sink) put(data []byte) {
	if s.add(data) {
		return
	}
	timer := time.NewTimer(sinkPatience)
	defer timer.Stop()
	for {
		select {
		case <-s.room:
			if s.add(data) {
				return
			}
		case <-s.done:
			return
		case <-timer.C:
			s.abort(errSlowReader)
			return
		}
	}
}

// add queues data if there is room. A sink that has ended swallows it.
func (s *sink) add(data []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.err != nil {
		return true
	}
	if len(s.data)+len(data) > sinkSize {
		return false
	}
	s.data = append(s.data, data...)
	signalOne(s.wake)
	return true
}

// end says that no more data comes; run writes what is queued, then closes the stream.
func (s *sink) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	signalOne(s.wake)
}

// abort drops what is queued and ends run, even out of a write that blocks.
func (s *sink) abort(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.data = nil
	signalOne(s.wake)
	_ = s.dst.SetWriteDeadline(time.Unix(1, 0)) // a closed file has no write to end
}

// failure returns why the reader was given up; nil where it was not.
func (s *sink) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// run writes the queue to the reader until the end, an error or abort.
func (s *sink) run() {
	defer close(s.done)
	defer func() { _ = s.dst.Close() }() // a pipe or socket: written is sent
	for {
		data, last := s.take()
		if data == nil && last {
			return
		}
		if data == nil {
			<-s.wake
			continue
		}
		if _, err := s.dst.Write(data); err != nil {
			s.abort(err)
			return
		}
	}
}

func (s *sink) take() (data []byte, last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, true
	}
	data, s.data = s.data, nil
	if len(data) > batchSize {
		data, s.data = data[:batchSize:batchSize], data[batchSize:]
	}
	if data != nil {
		signalOne(s.room)
	}
	return data, s.ended
}

func signalOne(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
