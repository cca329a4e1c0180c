package streaming

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

const (
	streamType  = "streamType"
	kindStdin   = "stdin"
	kindStdout  = "stdout"
	kindStderr  = "stderr"
	kindFailure = "error"
	kindResize  = "resize"
)

// spdyProtocols are the versions of exec and attach over SPDY: v3 brought resize, v4 the exit code. The first one,
// whose servers end stdin at once, is older than the CRI.
var spdyProtocols = []string{"v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io"}

// streamsWithin is how long a client may take to make its streams.
const streamsWithin = 30 * time.Second

// spdyStreams gathers the streams that a client makes for one exec or attach.
type spdyStreams struct {
	expected []string
	arrived  chan spdyStream

	mu   sync.Mutex
	seen []string
}

// spdyStream is one stream, whose reply to the client has been sent once replied is closed.
type spdyStream struct {
	httpstream.Stream
	kind    string
	replied <-chan struct{}
}

// ready waits for the reply. Where it could not be sent, the library would wait for it at every write, for ever.
func (x spdyStream) ready(c *conn, ended <-chan bool) bool {
	<-x.replied
	select {
	case <-ended:
		return false
	default:
		return c.alive.Err() == nil
	}
}

func acceptSPDY(w http.ResponseWriter, r *http.Request, want wanted) (*wire, error) {
	protocol, err := httpstream.Handshake(r, w, spdyProtocols)
	if err != nil {
		return nil, err
	}
	resize := want.tty && protocol != "v2.channel.k8s.io"
	s := newSPDYStreams(want, resize)
	connection := spdy.NewResponseUpgrader().UpgradeResponse(framing{w}, r, guarded(s.take))
	if connection == nil {
		return nil, errors.New("upgrade to SPDY: refused")
	}
	x := &wire{text: protocol != "v4.channel.k8s.io", gone: connection.CloseChan(), close: func() {
		_ = connection.Close()
		_ = connOf(r.Context()).Close() // the library waits for streams that came too late, until the client goes
	}}
	if err := s.await(r.Context(), x); err != nil {
		if x.failure != nil {
			_ = x.tell(err) // a client that is gone is not told
		}
		x.close()
		return nil, err
	}
	return x, nil
}

// guarded is for the library's goroutines, in which take is called.
func guarded(take httpstream.NewStreamHandler) httpstream.NewStreamHandler {
	return func(stream httpstream.Stream, replied <-chan struct{}) error {
		return Guard(func() error { return take(stream, replied) })
	}
}

func newSPDYStreams(want wanted, resize bool) *spdyStreams {
	s := &spdyStreams{expected: []string{kindFailure}}
	for _, k := range []struct {
		wanted bool
		kind   string
	}{{want.stdin, kindStdin}, {want.stdout, kindStdout}, {want.stderr, kindStderr}, {resize, kindResize}} {
		if k.wanted {
			s.expected = append(s.expected, k.kind)
		}
	}
	s.arrived = make(chan spdyStream, len(s.expected))
	return s
}

// take is called for each stream that the client makes, and never blocks. A client may make streams that the CRI's
// request does not name; it finds them ended.
func (s *spdyStreams) take(stream httpstream.Stream, replied <-chan struct{}) error {
	kind := stream.Headers().Get(streamType)
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.seen, kind) {
		return fmt.Errorf("a second %s stream", kind)
	}
	s.seen = append(s.seen, kind)
	if slices.Contains(s.expected, kind) {
		s.arrived <- spdyStream{stream, kind, replied} // has room for each once
		return nil
	}
	switch kind {
	case kindStdin, kindStdout, kindStderr, kindResize:
		go func() { _ = Guard(func() error { <-replied; return stream.Reset() }) }() // the reply comes when this function has returned
		return nil
	default:
		return fmt.Errorf("a stream of unknown type %q", kind)
	}
}

// await fills the wire.
func (s *spdyStreams) await(ctx context.Context, x *wire) error {
	late := time.NewTimer(streamsWithin)
	defer late.Stop()
	for range cap(s.arrived) {
		select {
		case stream := <-s.arrived:
			if !stream.ready(connOf(ctx), x.gone) {
				return errClientGone
			}
			x.add(stream)
		case <-late.C:
			return fmt.Errorf("the client has not made the streams %v within %s", s.expected, streamsWithin)
		case <-x.gone:
			return errClientGone
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (w *wire) add(stream spdyStream) {
	switch stream.kind {
	case kindStdin:
		w.stdin = stream
	case kindStdout:
		w.stdout = stream
	case kindStderr:
		w.stderr = stream
	case kindResize:
		w.resize = stream
	case kindFailure:
		w.failure = stream
	}
}

// framing gives the SPDY library a connection that sends each frame in one piece.
type framing struct{ http.ResponseWriter }

func (f framing) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	raw, buffered, err := http.NewResponseController(f.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return &frames{Conn: raw}, buffered, nil
}

// frames joins what the SPDY library writes: it sends the header of a frame in pieces of 4 bytes, each of which
// would be a packet of its own, or a WebSocket message. The library writes one frame at a time.
type frames struct {
	net.Conn
	buf []byte
}

// frameHeader is the size of a SPDY frame's header, whose last 3 bytes are the length of the rest.
const frameHeader = 8

func (f *frames) Write(p []byte) (int, error) {
	f.buf = append(f.buf, p...)
	if len(f.buf) < frameHeader {
		return len(p), nil
	}
	rest := int(f.buf[5])<<16 | int(f.buf[6])<<8 | int(f.buf[7])
	if len(f.buf) < frameHeader+rest {
		return len(p), nil
	}
	_, err := f.Conn.Write(f.buf)
	f.buf = f.buf[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
