package streaming

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

const forwardProtocol = "portforward.k8s.io"

// servePortForward serves one session, by whichever protocol its client speaks.
func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request, req *runtimeapi.PortForwardRequest) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	f := &forwarder{server: s, ctx: ctx, cancel: cancel, pod: req.GetPodSandboxId(), defect: s.defect("portforward", cancel),
		connected: make(chan struct{}), pairs: map[string]*pair{}}
	var err error
	switch {
	case !websocket.IsWebSocketUpgrade(r):
		err = f.serveSPDY(w, r)
	case isTunnel(r):
		err = f.serveTunnel(w, r)
	default:
		err = f.serveChannels(w, r, req.GetPort())
	}
	if err != nil {
		s.log.Debug("streaming client turned away", "kind", r.PathValue("kind"), "error", err)
	}
}

// forwarder is one session: connections to ports of a pod.
type forwarder struct {
	server *Server
	ctx    context.Context // ends with the session
	cancel context.CancelCauseFunc
	pod    string

	connection httpstream.Connection
	connected  chan struct{} // closed when connection is set

	defect func(error) // see Client

	mu     sync.Mutex // guards what follows, and additions to wg
	closed bool
	pairs  map[string]*pair // by request id: those of which one stream has come
	wg     sync.WaitGroup
}

// pair is the two streams of one connection over SPDY.
type pair struct {
	data, failure spdyStream
	late          *time.Timer
}

func (f *forwarder) serveSPDY(w http.ResponseWriter, r *http.Request) error {
	if _, err := httpstream.Handshake(r, w, []string{forwardProtocol}); err != nil {
		return err
	}
	connection := spdy.NewResponseUpgrader().UpgradeResponse(framing{w}, r, guarded(f.take))
	if connection == nil {
		return errors.New("upgrade to SPDY: refused")
	}
	f.serve(connection, connOf(r.Context()))
	return nil
}

func (f *forwarder) serveTunnel(w http.ResponseWriter, r *http.Request) error {
	ws, _, err := upgrade(w, r, []string{tunnelPrefix + forwardProtocol})
	if err != nil {
		return err
	}
	t := newTunnel(ws)
	connection, err := spdy.NewServerConnection(&frames{Conn: t}, guarded(f.take))
	if err != nil {
		return errors.Join(err, ws.Close())
	}
	f.serve(connection, t)
	return nil
}

// guard calls fn. A panic ends the session.
func (f *forwarder) guard(fn func()) {
	if err := Guard(func() error { fn(); return nil }); err != nil {
		f.defect(err)
	}
}

func (f *forwarder) spawn(fn func()) { f.wg.Go(func() { f.guard(fn) }) }

// serve waits for the end of the session, then for its connections, and closes what is below them.
func (f *forwarder) serve(connection httpstream.Connection, below io.Closer) {
	f.connection = connection
	close(f.connected)
	f.spawn(func() { connOf(f.ctx).watch(f.ctx) })
	f.await(connection.CloseChan())
	f.mu.Lock()
	f.closed = true
	for _, p := range f.pairs {
		p.late.Stop()
	}
	f.mu.Unlock()
	f.wg.Wait()
	_ = connection.Close()
	_ = below.Close() // the library waits for streams that came too late, until the client goes
}

// await returns at the end of the session, for whichever reason.
func (f *forwarder) await(gone <-chan bool) {
	select {
	case <-gone:
		f.cancel(errClientGone)
	case <-f.ctx.Done():
	}
	if errors.Is(context.Cause(f.ctx), errClientGone) {
		connOf(f.ctx).kill() // nobody is to be told, and nothing is to wait for it
	}
}

// take is called for each stream that the client makes, and never blocks. Two streams with one request id are a
// connection.
func (f *forwarder) take(stream httpstream.Stream, replied <-chan struct{}) error {
	port, err := strconv.ParseUint(stream.Headers().Get("port"), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("a stream for port %q", stream.Headers().Get("port"))
	}
	x := spdyStream{stream, stream.Headers().Get(streamType), replied}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return errShutdown
	}
	id := requestID(x)
	p := f.pairs[id]
	if p == nil {
		p = &pair{}
		p.late = time.AfterFunc(streamsWithin, func() { f.guard(func() { f.abandon(id, p) }) })
		f.pairs[id] = p
	}
	switch {
	case x.kind == "data" && p.data.Stream == nil:
		p.data = x
	case x.kind == kindFailure && p.failure.Stream == nil:
		p.failure = x
	default:
		return fmt.Errorf("a stream of type %q, for request %s", x.kind, id)
	}
	if p.data.Stream != nil && p.failure.Stream != nil {
		delete(f.pairs, id)
		p.late.Stop()
		f.spawn(func() { f.forward(p, uint16(port)) })
	}
	return nil
}

// requestID: old clients send none, but make the error stream first and the data stream next.
func requestID(x spdyStream) string {
	if id := x.Headers().Get("requestID"); id != "" {
		return id
	}
	id := int(x.Identifier())
	if x.kind == "data" {
		id -= 2
	}
	return "stream " + strconv.Itoa(id)
}

// abandon gives up a connection of which only one stream has come.
func (f *forwarder) abandon(id string, p *pair) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pairs[id] != p {
		return
	}
	delete(f.pairs, id)
	for _, x := range []spdyStream{p.data, p.failure} {
		if x.Stream != nil {
			_ = x.Reset()
		}
	}
}

// forward carries one connection.
func (f *forwarder) forward(p *pair, port uint16) {
	<-f.connected
	streams := []spdyStream{p.failure, p.data}
	ready := true
	for _, x := range streams {
		ready = x.ready(connOf(f.ctx), f.connection.CloseChan()) && ready
	}
	client := &Client{Stdin: p.data, Stdout: p.data, defect: f.defect}
	if ready {
		if err := f.connect(port, client); err != nil {
			_, _ = io.WriteString(p.failure, sentence(err)) // a client that is gone is not told
		}
	}
	for _, x := range streams {
		if ready {
			_ = x.Close()
		}
		// What the client still sends is not read by anybody, and would hold up its other connections.
		_ = x.Reset()
		f.connection.RemoveStreams(x.Stream)
	}
	client.wg.Wait()
}

func (f *forwarder) connect(port uint16, client *Client) error {
	err := Guard(func() error { return reason(f.ctx, f.server.runtime.PortForward(f.ctx, f.pod, port, client)) })
	if defect := (*Defect)(nil); errors.As(err, &defect) {
		f.defect(err)
	}
	return err
}

// serveChannels serves the ports that the CRI's request names, one connection each, on two channels each. Both
// begin with the number of the port.
func (f *forwarder) serveChannels(w http.ResponseWriter, r *http.Request, ports []int32) error {
	if len(ports) == 0 || len(ports) > 100 {
		err := fmt.Errorf("forward over WebSocket channels: the request names %d ports, not 1 to 100", len(ports))
		http.Error(w, err.Error(), http.StatusBadRequest)
		return err
	}
	ws, protocol, err := upgrade(w, r, slices.Sorted(maps.Keys(portDialects)))
	if err != nil {
		return err
	}
	inputs := make([]byte, len(ports))
	for i := range ports {
		inputs[i] = byte(2 * i)
	}
	c := newChannels(ws, portDialects[protocol], inputs...)
	c.start()
	f.spawn(func() { connOf(f.ctx).watch(f.ctx) })
	f.spawn(func() { f.await(c.done) })
	var connections sync.WaitGroup
	for i, port := range ports {
		connections.Go(func() { f.guard(func() { f.forwardChannel(c, byte(2*i), uint16(port)) }) })
	}
	connections.Wait()
	f.cancel(nil)
	c.close()
	f.wg.Wait()
	return nil
}

func (f *forwarder) forwardChannel(c *channels, data byte, port uint16) {
	in, out, failure := c.inputs[data], c.output(data), c.output(data+1)
	client := &Client{Stdin: in, Stdout: out, defect: f.defect}
	number := binary.LittleEndian.AppendUint16(nil, port)
	_, err := out.Write(number)
	if err == nil {
		_, err = failure.Write(number)
	}
	if err == nil {
		err = f.connect(port, client)
	}
	if err != nil {
		_, _ = io.WriteString(failure, sentence(err)) // a client that is gone is not told
	}
	in.PipeReader.Close()
	client.wg.Wait()
}
