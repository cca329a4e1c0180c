package streaming

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// Each message of a WebSocket begins with the number of its channel.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelFailure
	channelResize
	// channelClose is followed by the number of a channel on which the client sends no more; v5 only.
	channelClose = 255
)

// dialect is one version of the channels.
type dialect struct {
	halfClose bool // has channelClose
	text      bool // see wire.text
	base64    bool // text messages; the channel is a digit, the rest is base64
}

var remoteDialects = map[string]dialect{
	"v5.channel.k8s.io":        {halfClose: true},
	"v4.channel.k8s.io":        {},
	"v4.base64.channel.k8s.io": {base64: true},
	"channel.k8s.io":           {text: true},
	"base64.channel.k8s.io":    {text: true, base64: true},
	"":                         {text: true},
}

// messageSize is the most data of a message. Many clients take a message whole, in one frame, or not at all.
const messageSize = 32 << 10

var messageBuffers sync.Pool

// upgrade answers a WebSocket request, with an error where no protocol is common.
func upgrade(w http.ResponseWriter, r *http.Request, protocols []string) (*websocket.Conn, string, error) {
	offered := websocket.Subprotocols(r)
	if len(offered) == 0 {
		offered = []string{""}
	}
	at := slices.IndexFunc(offered, func(p string) bool { return slices.Contains(protocols, p) })
	if at < 0 {
		err := fmt.Errorf("upgrade to WebSocket: the client speaks %q, the server %q", offered, protocols)
		http.Error(w, err.Error(), http.StatusForbidden)
		return nil, "", err
	}
	upgrader := websocket.Upgrader{
		CheckOrigin:     func(*http.Request) bool { return true }, // see Serve
		WriteBufferPool: &messageBuffers,
		WriteBufferSize: messageSize + 16,
	}
	if offered[at] != "" {
		upgrader.Subprotocols = []string{offered[at]}
	}
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return nil, "", fmt.Errorf("upgrade to WebSocket: %w", err)
	}
	return ws, offered[at], nil
}

// channels are the streams of one WebSocket.
type channels struct {
	dialect
	ws     *websocket.Conn
	inputs map[byte]*input
	pings  chan string // the last one that is not answered
	done   chan bool   // closed when nothing more comes
	wg     sync.WaitGroup

	mu sync.Mutex // one message at a time is written
}

// input is a channel that the client sends on.
type input struct {
	*io.PipeReader
	w *io.PipeWriter
}

func newChannels(ws *websocket.Conn, d dialect, inputs ...byte) *channels {
	c := &channels{dialect: d, ws: ws, inputs: map[byte]*input{}, pings: make(chan string, 1), done: make(chan bool)}
	for _, channel := range inputs {
		r, w := io.Pipe()
		c.inputs[channel] = &input{r, w}
	}
	ws.SetPingHandler(c.ping)
	return c
}

// start begins to read; close waits for what it starts.
func (c *channels) start() {
	c.wg.Go(func() {
		defer close(c.done)
		_ = Guard(c.receive) // whatever it was, the session is over
		for _, in := range c.inputs {
			in.w.Close()
		}
	})
	c.wg.Go(func() { _ = Guard(func() error { c.beat(); return nil }) }) // without pongs the client gives up
}

// close says goodbye and ends the connection.
func (c *channels) close() {
	for _, in := range c.inputs {
		in.PipeReader.Close()
	}
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = c.ws.WriteControl(websocket.CloseMessage, bye, time.Time{}) // the client may have gone
	_ = c.ws.Close()
	c.wg.Wait()
}

func acceptChannels(w http.ResponseWriter, r *http.Request, want wanted) (*wire, error) {
	ws, protocol, err := upgrade(w, r, slices.Sorted(maps.Keys(remoteDialects)))
	if err != nil {
		return nil, err
	}
	inputs := []byte{channelResize}
	if want.stdin {
		inputs = append(inputs, channelStdin)
	}
	c := newChannels(ws, remoteDialects[protocol], inputs...)
	x := &wire{resize: c.inputs[channelResize], failure: c.output(channelFailure), text: c.text, gone: c.done, close: c.close}
	first := x.failure
	if want.stderr {
		x.stderr = c.output(channelStderr)
		first = x.stderr
	}
	if want.stdout {
		x.stdout = c.output(channelStdout)
		first = x.stdout
	}
	if want.stdin {
		x.stdin = c.inputs[channelStdin]
	}
	c.start()
	// Clients take an empty message as the sign that they are connected.
	if _, err := first.Write(nil); err != nil {
		c.close()
		return nil, fmt.Errorf("greet client: %w", err)
	}
	return x, nil
}

// receive passes messages on to the inputs until the client ends the connection. An input that nobody reads holds
// up those after it: the protocol has no flow control, and the alternative is to keep what comes, without bound.
func (c *channels) receive() error {
	buf := make([]byte, messageSize)
	for {
		_, message, err := c.ws.NextReader()
		if err != nil {
			return err
		}
		var head [2]byte
		if _, err := io.ReadFull(message, head[:1]); errors.Is(err, io.EOF) {
			continue // empty
		} else if err != nil {
			return err
		}
		if c.halfClose && head[0] == channelClose {
			if _, err := io.ReadFull(message, head[1:]); err != nil {
				return fmt.Errorf("close a channel: %w", err)
			}
			if in, ok := c.inputs[head[1]]; ok {
				in.w.Close()
			}
			continue
		}
		if c.base64 {
			head[0] -= '0'
			message = base64.NewDecoder(base64.StdEncoding, message)
		}
		in, ok := c.inputs[head[0]]
		if !ok {
			continue
		}
		// Who reads an input may have stopped, which is no reason to end the rest.
		if _, err := io.CopyBuffer(in.w, message, buf); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			return err
		}
	}
}

// output returns the writer of a channel.
func (c *channels) output(channel byte) io.Writer { return output{c, channel} }

type output struct {
	channels *channels
	channel  byte
}

func (o output) Write(p []byte) (int, error) {
	for sent := 0; ; {
		n := min(len(p)-sent, messageSize)
		if err := o.channels.send(o.channel, p[sent:sent+n]); err != nil {
			return sent, err
		}
		if sent += n; sent == len(p) {
			return sent, nil
		}
	}
}

func (c *channels) send(channel byte, data []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.base64 {
		text := string('0'+channel) + base64.StdEncoding.EncodeToString(data)
		return c.ws.WriteMessage(websocket.TextMessage, []byte(text))
	}
	w, err := c.ws.NextWriter(websocket.BinaryMessage)
	if err != nil {
		return err
	}
	if _, err := w.Write([]byte{channel}); err != nil {
		return err
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	return w.Close()
}

// beatEvery is how often the client hears of us unasked. client-go gives up 61 s after the last pong, and its pings
// are behind input that the process may not have taken for longer.
const beatEvery = 20 * time.Second

// ping leaves a ping to beat, which may wait for a client that does not read. Of several, the last is answered.
func (c *channels) ping(data string) error {
	select {
	case <-c.pings:
	default:
	}
	c.pings <- data // has room: only receive comes here
	return nil
}

// beat sends pongs until nothing more comes.
func (c *channels) beat() {
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		var data string
		select {
		case data = <-c.pings:
		case <-ticker.C:
		case <-c.done:
			return
		}
		// Without a deadline: one that passes ends the connection, and the client may only be slow.
		if err := c.ws.WriteControl(websocket.PongMessage, []byte(data), time.Time{}); err != nil {
			return
		}
	}
}

// portDialects are those of port-forward without SPDY inside.
var portDialects = map[string]dialect{
	"v4.channel.k8s.io":        {},
	"v4.base64.channel.k8s.io": {base64: true},
	"":                         {},
}

// isTunnel tells whether the client wants SPDY inside the WebSocket.
func isTunnel(r *http.Request) bool {
	return slices.ContainsFunc(websocket.Subprotocols(r), func(p string) bool { return strings.HasPrefix(p, tunnelPrefix) })
}
