package streaming

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
)

// runtimeFunc is a Runtime of which only Exec is used.
type runtimeFunc func(ctx context.Context, client *Client) error

func (f runtimeFunc) Exec(ctx context.Context, _ *runtimeapi.ExecRequest, client *Client) error {
	return f(ctx, client)
}

func (f runtimeFunc) Attach(ctx context.Context, _ *runtimeapi.AttachRequest, client *Client) error {
	return f(ctx, client)
}

func (f runtimeFunc) PortForward(ctx context.Context, _ string, _ uint16, client *Client) error {
	return f(ctx, client)
}

// upper reads five bytes, answers in capitals and ends with 3.
func upper(_ context.Context, client *Client) error {
	buf := make([]byte, 5)
	if _, err := io.ReadFull(client.Stdin, buf); err != nil {
		return err
	}
	if _, err := client.Stdout.Write(bytes.ToUpper(buf)); err != nil {
		return err
	}
	if _, err := io.WriteString(client.Stderr, "told"); err != nil {
		return err
	}
	return ExitError(3)
}

var allStreams = &runtimeapi.ExecRequest{Stdin: true, Stdout: true, Stderr: true}

// serve runs a server for the test, with two listeners.
func serve(t *testing.T, runtime Runtime) (s *Server, node string) {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	var listeners [2]net.Listener
	for i := range listeners {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners[i] = l
	}
	s = Serve(runtime, slog.New(slog.DiscardHandler), listeners[0], listeners[1])
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return s, listeners[1].Addr().String()
}

func (s *Server) execURL(t *testing.T) string {
	t.Helper()
	url, err := s.ExecURL(allStreams)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(url, "http:", "ws:", 1)
}

func dial(url, protocol string, header http.Header) (ws *websocket.Conn, code int, text string, err error) {
	dialer := websocket.Dialer{}
	if protocol != "" {
		dialer.Subprotocols = []string{protocol}
	}
	ws, resp, err := dialer.Dial(url, header)
	if resp != nil {
		raw, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		code, text = resp.StatusCode, string(raw)
	}
	return ws, code, text, err
}

func TestTickets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := tickets{open: map[digest]ticket{}}
		issue := func() string {
			t.Helper()
			token, err := x.issue("exec", func(http.ResponseWriter, *http.Request) {})
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		redeem := func(kind, token string, want bool) {
			t.Helper()
			if _, ok := x.redeem(kind, token); ok != want {
				t.Errorf("redeem %s %s: %v", kind, token, ok)
			}
		}
		a, b, c, d := issue(), issue(), issue(), issue()
		if len(a) < 26 || a == b {
			t.Errorf("tokens %s, %s", a, b)
		}
		redeem("exec", a, true)
		redeem("exec", a, false)
		redeem("attach", b, false)
		redeem("exec", b, false)
		redeem("exec", "", false)
		time.Sleep(ticketLife)
		redeem("exec", c, true)
		time.Sleep(time.Nanosecond)
		redeem("exec", d, false)
		for range maxTickets {
			issue()
		}
		if _, err := x.issue("exec", nil); !errors.Is(err, ErrTooMany) {
			t.Errorf("%v", err)
		}
		time.Sleep(ticketLife + time.Nanosecond)
		issue()
		if len(x.open) != 1 {
			t.Errorf("%d tickets are kept", len(x.open))
		}
	})
}

// TestOrigin: pages of a browser do not get in by the host's port; in the node, the kubelet's clients may say where
// they are from.
func TestOrigin(t *testing.T) {
	s, node := serve(t, runtimeFunc(upper))
	for _, test := range []struct {
		origin string
		host   int
	}{
		{"", http.StatusSwitchingProtocols},
		{"http://" + s.Addr(), http.StatusSwitchingProtocols},
		{"http://evil.example", http.StatusForbidden},
		{"https://" + s.Addr(), http.StatusForbidden},
		{"http://localhost", http.StatusForbidden},
		{"null", http.StatusForbidden},
	} {
		for _, inside := range []bool{false, true} {
			url, want := s.execURL(t), test.host
			if inside {
				url, want = strings.Replace(url, s.Addr(), node, 1), http.StatusSwitchingProtocols
			}
			header := http.Header{}
			if test.origin != "" {
				header.Set("Origin", test.origin)
			}
			ws, code, text, err := dial(url, "v5.channel.k8s.io", header)
			if code != want {
				t.Errorf("from %q, inside %v: %d %s, %v", test.origin, inside, code, text, err)
			}
			if err == nil {
				ws.Close()
				continue
			}
			if ws, _, _, err = dial(url, "v5.channel.k8s.io", nil); err != nil {
				t.Errorf("who was refused has used the token up: %v", err)
				continue
			}
			ws.Close()
		}
	}
}

// TestHost: a page that has made its own name lead to the host's port does not get in by it.
func TestHost(t *testing.T) {
	s, node := serve(t, runtimeFunc(upper))
	_, port, err := net.SplitHostPort(s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]int{
		s.Addr(): http.StatusSwitchingProtocols, "localhost:" + port: http.StatusSwitchingProtocols, "localhost": http.StatusSwitchingProtocols,
		"[::1]:" + port: http.StatusSwitchingProtocols, "192.0.2.1": http.StatusSwitchingProtocols,
		"evil.example:" + port: http.StatusForbidden, "127.0.0.1.evil.example": http.StatusForbidden, "localhost.evil.example:80": http.StatusForbidden,
	} {
		for _, inside := range []bool{false, true} {
			url, want := s.execURL(t), want
			if inside { // a kubelet passes on what its own client said
				url, want = strings.Replace(url, s.Addr(), node, 1), http.StatusSwitchingProtocols
			}
			ws, code, text, err := dial(url, "v5.channel.k8s.io", http.Header{"Host": {host}})
			if code != want {
				t.Errorf("as %q, inside %v: %d %s, %v", host, inside, code, text, err)
			}
			if err == nil {
				ws.Close()
			}
		}
	}
}

// TestPanicEndsOneSession: a defect of the daemon's ends the session that has met it, whose client is told, and no other.
func TestPanicEndsOneSession(t *testing.T) {
	for name, run := range map[string]runtimeFunc{
		"in the call": func(context.Context, *Client) error { panic("a test's") },
		"in a goroutine of it": func(ctx context.Context, client *Client) error {
			client.Go(func() { panic("a test's") })
			<-ctx.Done()
			return ctx.Err()
		},
		"in a copy of its own": func(ctx context.Context, client *Client) error {
			go client.Guard(func() { panic("a test's") })
			<-ctx.Done()
			return ctx.Err()
		},
		"where a nil is met": func(context.Context, *Client) error { var nobody *Client; return errors.New(fmt.Sprint(nobody.Sizes)) },
	} {
		t.Run(name, func(t *testing.T) {
			held, let := make(chan struct{}), make(chan struct{})
			s, _ := serve(t, runtimeFunc(func(ctx context.Context, client *Client) error {
				select {
				case <-held:
					return run(ctx, client)
				default:
				}
				close(held)
				<-let
				return upper(ctx, client)
			}))
			var got [2]string
			var sessions sync.WaitGroup
			for i := range got {
				ws, _, _, err := dial(s.execURL(t), "v5.channel.k8s.io", nil)
				if err != nil {
					t.Fatal(err)
				}
				defer ws.Close()
				<-held // the second one comes after the first
				if err := ws.WriteMessage(websocket.BinaryMessage, []byte("\x00hello")); err != nil {
					t.Fatal(err)
				}
				sessions.Go(func() {
					for {
						_, raw, err := ws.ReadMessage()
						if err != nil {
							return
						}
						if len(raw) > 0 && raw[0] == channelFailure {
							got[i] = string(raw[1:])
							if i == 1 {
								close(let)
							}
						}
					}
				})
			}
			sessions.Wait()
			if !strings.Contains(got[0], "exit code 3") || !strings.Contains(got[1], "the daemon has a defect") {
				t.Errorf("the clients were told %q", got)
			}
		})
	}
}

// TestDialects: every version of the channels, as its clients speak it.
func TestDialects(t *testing.T) {
	s, _ := serve(t, runtimeFunc(upper))
	for protocol, d := range remoteDialects {
		t.Run(protocol, func(t *testing.T) {
			ws, _, _, err := dial(s.execURL(t), protocol, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer ws.Close()
			if ws.Subprotocol() != protocol {
				t.Errorf("protocol %q", ws.Subprotocol())
			}
			for _, message := range []struct {
				channel byte
				data    string
			}{{channelStdin, "he"}, {channelStdout, "not for clients"}, {77, "nor this"}, {channelResize, `{"Width":80,"Height":24}`},
				{channelResize, "not a size"}, {channelStdin, ""}, {channelStdin, "llo"}} {
				kind, raw := websocket.BinaryMessage, append([]byte{message.channel}, message.data...)
				if d.base64 {
					kind, raw = websocket.TextMessage, fmt.Appendf(nil, "%c%s", '0'+message.channel, base64.StdEncoding.EncodeToString([]byte(message.data)))
				}
				if err := ws.WriteMessage(kind, raw); err != nil {
					t.Fatal(err)
				}
			}
			got := map[byte]string{}
			for {
				kind, raw, err := ws.ReadMessage()
				if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
					break
				}
				if err != nil || len(raw) == 0 || (kind == websocket.TextMessage) != d.base64 {
					t.Fatalf("%d %q, %v", kind, raw, err)
				}
				channel, data := raw[0], raw[1:]
				if d.base64 {
					channel -= '0'
					if data, err = base64.StdEncoding.DecodeString(string(data)); err != nil {
						t.Fatal(err)
					}
				}
				got[channel] += string(data)
			}
			var status struct {
				Status, Reason string
				Details        struct {
					Causes []struct{ Reason, Message string }
				}
			}
			failure := got[channelFailure]
			delete(got, channelFailure)
			if d.text {
				if failure != "command terminated with exit code 3" {
					t.Errorf("told %q", failure)
				}
			} else if err := json.Unmarshal([]byte(failure), &status); err != nil || status.Status != "Failure" || status.Reason != "NonZeroExitCode" ||
				len(status.Details.Causes) != 1 || status.Details.Causes[0].Reason != "ExitCode" || status.Details.Causes[0].Message != "3" {
				t.Errorf("told %q, %v", failure, err)
			}
			if want := map[byte]string{channelStdout: "HELLO", channelStderr: "told"}; fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

// TestTurnedAway: who speaks something else is told what is spoken here.
func TestTurnedAway(t *testing.T) {
	s, _ := serve(t, runtimeFunc(upper))
	_, code, text, err := dial(s.execURL(t), "v6.channel.k8s.io", nil)
	if err == nil || code != http.StatusForbidden || !strings.Contains(text, "v6.channel.k8s.io") || !strings.Contains(text, "v5.channel.k8s.io") {
		t.Errorf("%d %q, %v", code, text, err)
	}
	for _, test := range []struct {
		method, path, upgrade string
		want                  int
	}{
		{http.MethodGet, "/exec/nothing", "", http.StatusNotFound},
		{http.MethodGet, "/", "", http.StatusNotFound},
		{http.MethodPut, "/exec/x", "", http.StatusMethodNotAllowed},
		{http.MethodGet, "", "", http.StatusBadRequest},
		{http.MethodPost, "", "SPDY/3.1", http.StatusBadRequest}, // without a version of the streams
	} {
		url := "http://" + s.Addr() + test.path
		if test.path == "" {
			url = strings.Replace(s.execURL(t), "ws:", "http:", 1)
		}
		req, err := http.NewRequest(test.method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if test.upgrade != "" {
			req.Header.Set("Connection", "Upgrade")
			req.Header.Set("Upgrade", test.upgrade)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != test.want {
			t.Errorf("%s %s: %s, want %d", test.method, test.path, resp.Status, test.want)
		}
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// TestStuckClientAtTheEnd: a client that takes nothing does not keep the server from ending.
func TestStuckClientAtTheEnd(t *testing.T) {
	writing := make(chan struct{})
	s, _ := serve(t, runtimeFunc(func(_ context.Context, client *Client) error {
		close(writing)
		for buf := make([]byte, 1<<20); ; {
			if _, err := client.Stdout.Write(buf); err != nil {
				return err
			}
		}
	}))
	ws, _, _, err := dial(s.execURL(t), "v5.channel.k8s.io", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	<-writing
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// pipes is a listener whose connections are in memory, where time may be faked.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), ended: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.ended) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return ours, nil
}

// TestBeat: a client whose input is not taken, and whose pings are behind it, hears that the server is there for as
// long as that lasts; a session that is silent has no other end.
func TestBeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		taken := make(chan struct{})
		host, node := newPipes(), newPipes()
		s := Serve(runtimeFunc(func(_ context.Context, client *Client) error {
			<-taken
			buf := make([]byte, 10)
			_, err := io.ReadFull(client.Stdin, buf)
			return err
		}), slog.New(slog.DiscardHandler), host, node)
		dialer := websocket.Dialer{NetDialContext: host.dial, Subprotocols: []string{"v5.channel.k8s.io"}}
		ws, resp, err := dialer.Dial(s.execURL(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		const patience = 61 * time.Second // client-go's
		pongs := 0
		ws.SetPongHandler(func(string) error {
			pongs++
			return ws.SetReadDeadline(time.Now().Add(patience))
		})
		sent := make(chan error, 1)
		go func() {
			for range 2 {
				if err := ws.WriteMessage(websocket.BinaryMessage, append([]byte{channelStdin}, "input"...)); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		time.AfterFunc(6*time.Hour, func() { close(taken) })
		if err := ws.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		var told string
		for err == nil {
			var raw []byte
			if _, raw, err = ws.ReadMessage(); err == nil && raw[0] == channelFailure {
				told = string(raw[1:])
			}
		}
		if !websocket.IsCloseError(err, websocket.CloseNormalClosure) || told != `{"status":"Success"}` || pongs < 360 {
			t.Errorf("%v, told %q after %d pongs", err, told, pongs)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		ws.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// fakeStream is a stream of which only the headers and the end count.
type fakeStream struct {
	httpstream.Stream
	headers http.Header
	reset   bool
}

func (f *fakeStream) Headers() http.Header { return f.headers }
func (f *fakeStream) Identifier() uint32   { return 1 }
func (f *fakeStream) Reset() error         { f.reset = true; return nil }

// TestMissingStreams: a client that does not make its streams is not waited for.
func TestMissingStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replied := make(chan struct{})
		close(replied)
		s := newSPDYStreams(wanted{stdin: true, stdout: true}, false)
		if err := s.take(&fakeStream{headers: http.Header{"Streamtype": {"stdin"}}}, replied); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"stdin", "unheard-of", ""} {
			if err := s.take(&fakeStream{headers: http.Header{"Streamtype": {kind}}}, replied); err == nil {
				t.Errorf("a second stream of type %q was taken", kind)
			}
		}
		ctx := context.WithValue(t.Context(), connKey{}, newConn(nil, &Server{ctx: t.Context()}))
		err := s.await(ctx, &wire{gone: make(chan bool)})
		if err == nil || !strings.Contains(err.Error(), "[error stdin stdout] within 30s") {
			t.Errorf("%v", err)
		}

		f := &forwarder{pairs: map[string]*pair{}}
		half := &fakeStream{headers: http.Header{"Streamtype": {"data"}, "Port": {"80"}, "Requestid": {"1"}}}
		if err := f.take(half, replied); err != nil {
			t.Fatal(err)
		}
		if err := f.take(half, replied); err == nil {
			t.Error("a second data stream was taken")
		}
		time.Sleep(streamsWithin + time.Second)
		f.mu.Lock()
		defer f.mu.Unlock()
		if !half.reset || len(f.pairs) != 0 {
			t.Errorf("reset %v, %d pairs are kept", half.reset, len(f.pairs))
		}
	})
}

// writes records what is written in one piece.
type writes struct {
	net.Conn
	pieces []string
}

func (w *writes) Write(p []byte) (int, error) {
	w.pieces = append(w.pieces, string(p))
	return len(p), nil
}

func TestFrames(t *testing.T) {
	w := &writes{}
	f := &frames{Conn: w}
	data := strings.Repeat("d", 0x10203)
	want := []string{"\x00\x00\x00\x05\x01\x00\x00\x00", "\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01", "\x00\x00\x00\x05\x00\x01\x02\x03" + data}
	for _, piece := range []string{"\x00\x00\x00\x05", "\x01\x00\x00\x00", "", // the end of stream 5
		"\x80\x03", "\x00\x06", "\x00\x00\x00\x04", "\x00\x00\x00\x01", // a ping
		"\x00\x00\x00\x05", "\x00\x01\x02\x03", data} {
		if n, err := f.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("%d of %d, %v", n, len(piece), err)
		}
	}
	if fmt.Sprintf("%q", w.pieces) != fmt.Sprintf("%q", want) {
		t.Errorf("%d pieces, want %d", len(w.pieces), len(want))
	}
}
