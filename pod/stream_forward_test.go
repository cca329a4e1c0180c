package pod

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// forwards are the ways in which clients speak port-forward.
var forwards = []struct {
	name string
	dial func(u *url.URL) (httpstream.Dialer, error)
}{
	{"SPDY", func(u *url.URL) (httpstream.Dialer, error) {
		transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: u.Host})
		if err != nil {
			return nil, err
		}
		return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u), nil
	}},
	{"SPDY in a WebSocket", func(u *url.URL) (httpstream.Dialer, error) {
		return portforward.NewSPDYOverWebsocketDialer(u, &rest.Config{Host: u.Host})
	}},
}

// eachForward runs fn for each of them, on a pod of its own.
func eachForward(t *testing.T, fn func(t *testing.T, x *forwarding)) {
	for _, f := range forwards {
		t.Run(f.name, func(t *testing.T) {
			h := newHarness(t)
			id := h.run(h.podConfig("p"))
			p, err := h.index.pod(id)
			if err != nil {
				t.Fatal(err)
			}
			fn(t, &forwarding{harness: h, pod: p, dial: f.dial})
		})
	}
}

// forwarding is a pod to which ports are forwarded.
type forwarding struct {
	*harness
	pod  *pod
	dial func(u *url.URL) (httpstream.Dialer, error)
	via  string // the address to connect to, where it is not the server's
}

// serve answers each connection to a port in the pod's namespace; the returned function ends it.
func (x *forwarding) serve(address string, answer func(conn *net.TCPConn)) (stop func()) {
	x.t.Helper()
	var l net.Listener
	err := inNetNS(x.pod.nsPath("net"), func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		x.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				answer(conn.(*net.TCPConn))
			})
		}
	})
	return func() { l.Close(); wg.Wait() }
}

// echo answers once the client has ended its half.
func echo(conn *net.TCPConn) {
	raw, _ := io.ReadAll(conn)
	fmt.Fprintf(conn, "echo %s", raw)
}

func (x *forwarding) dialer() httpstream.Dialer {
	x.t.Helper()
	resp, err := x.PortForward(x.ctx(), &runtimeapi.PortForwardRequest{PodSandboxId: x.pod.spec.ID[:8]})
	if err != nil {
		x.t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		x.t.Fatal(err)
	}
	if x.via != "" {
		u.Host = x.via
	}
	dialer, err := x.dial(u)
	if err != nil {
		x.t.Fatal(err)
	}
	return dialer
}

// forward forwards a local port as kubectl does, and returns its address.
func (x *forwarding) forward(port string) (local string, stop func()) {
	x.t.Helper()
	done, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(x.dialer(), []string{"0:" + port}, done, ready, io.Discard, io.Discard)
	if err != nil {
		x.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		x.t.Fatal(err)
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		x.t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), func() {
		close(done)
		if err := <-ended; err != nil {
			x.t.Error(err)
		}
	}
}

// ask sends text to address, ends that half and reads the answer.
func ask(address, text string) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	raw, err := io.ReadAll(conn)
	return string(raw), err
}

// TestPortForward: several connections at once, to programs on either loopback, with half-closed TCP.
func TestPortForward(t *testing.T) {
	eachForward(t, func(t *testing.T, x *forwarding) {
		for _, address := range []string{"127.0.0.1:7777", "[::1]:7778"} {
			defer x.serve(address, echo)()
			_, port, _ := net.SplitHostPort(address)
			local, stop := x.forward(port)
			idle, err := net.Dial("tcp", local) // a connection that says nothing is in nobody's way
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range 10 {
				wg.Go(func() {
					text := strings.Repeat(strconv.Itoa(i), 100_000)
					if got, err := ask(local, text); got != "echo "+text || err != nil {
						t.Errorf("%s: %d bytes, %v", address, len(got), err)
					}
				})
			}
			wg.Wait()
			idle.Close()
			stop()
		}
	})
}

// pair makes the two streams of one connection, as kubectl does.
func pair(conn httpstream.Connection, port, id string) (data, failure httpstream.Stream, err error) {
	headers := http.Header{"Port": {port}, "Requestid": {id}, "Streamtype": {"error"}}
	if failure, err = conn.CreateStream(headers); err != nil {
		return nil, nil, err
	}
	headers.Set("Streamtype", "data")
	data, err = conn.CreateStream(headers)
	return data, failure, err
}

// TestPortForwardRefused: where nobody listens the client is told so, and other connections go on.
func TestPortForwardRefused(t *testing.T) {
	eachForward(t, func(t *testing.T, x *forwarding) {
		defer x.serve("127.0.0.1:7777", echo)()
		conn, _, err := x.dialer().Dial("portforward.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		good, _, err := pair(conn, "7777", "0")
		if err != nil {
			t.Fatal(err)
		}
		_, failure, err := pair(conn, "7779", "1")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(failure)
		want := "forward to port 7779 of pod " + x.pod.spec.ID + ": nothing listens there, on 127.0.0.1 or ::1"
		if err != nil || string(raw) != want {
			t.Errorf("%q, %v", raw, err)
		}
		if _, err := io.WriteString(good, "ping"); err != nil {
			t.Error(err)
		}
		good.Close()
		if raw, err := io.ReadAll(good); string(raw) != "echo ping" || err != nil {
			t.Errorf("%q, %v", raw, err)
		}
		for _, port := range []string{"", "0", "65536", "http"} {
			if _, _, err := pair(conn, port, "2"); err == nil {
				t.Errorf("a stream for port %q", port)
			}
		}
	})
}

// TestPortForwardEnds: connections end with their client, and are told of the service's end.
func TestPortForwardEnds(t *testing.T) {
	eachForward(t, func(t *testing.T, x *forwarding) {
		connected, ended := make(chan struct{}, 100), make(chan struct{}, 100)
		defer x.serve("127.0.0.1:7777", func(conn *net.TCPConn) {
			connected <- struct{}{}
			_, _ = io.Copy(io.Discard, conn)
			ended <- struct{}{}
		})()
		for range 3 {
			conn, _, err := x.dialer().Dial("portforward.k8s.io")
			if err != nil {
				t.Fatal(err)
			}
			for i := range 5 {
				if _, _, err := pair(conn, "7777", strconv.Itoa(i)); err != nil {
					t.Fatal(err)
				}
				<-connected
			}
			// Half a connection, and one that just comes about.
			if _, err := conn.CreateStream(http.Header{"Port": {"7777"}, "Requestid": {"half"}, "Streamtype": {"data"}}); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			for range 5 {
				<-ended
			}
		}
		conn, _, err := x.dialer().Dial("portforward.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, failure, err := pair(conn, "7777", "0")
		if err != nil {
			t.Fatal(err)
		}
		<-connected
		x.restart(nil)
		if raw, err := io.ReadAll(failure); string(raw) != "the daemon is shutting down" {
			t.Errorf("%q, %v", raw, err)
		}
		<-ended
	})
}

// TestPortForwardLeaving: clients that die while they make streams leave nothing behind.
func TestPortForwardLeaving(t *testing.T) {
	eachForward(t, func(t *testing.T, x *forwarding) {
		defer x.serve("127.0.0.1:7777", echo)()
		for round := range 20 {
			wire := newCut(t, x.streams.Addr())
			x.via = wire.addr()
			conn, _, err := x.dialer().Dial("portforward.k8s.io")
			if err != nil {
				t.Fatal(err)
			}
			made := make(chan struct{}, 12)
			for i := range cap(made) {
				go func() {
					_, _, _ = pair(conn, "7777", strconv.Itoa(i)) // fails where the wire is cut before
					made <- struct{}{}
				}()
			}
			for range round % cap(made) {
				<-made
			}
			wire.cut()
		}
	})
}

// cut is a wire to a server that can be cut through.
type cut struct {
	l     net.Listener
	mu    sync.Mutex
	conns []net.Conn
	wg    sync.WaitGroup
}

func newCut(t *testing.T, server string) *cut {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cut{l: l}
	c.wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", server)
			if err != nil {
				near.Close()
				return
			}
			c.mu.Lock()
			c.conns = append(c.conns, near, far)
			c.mu.Unlock()
			c.wg.Go(func() { _, _ = io.Copy(far, near) })
			c.wg.Go(func() { _, _ = io.Copy(near, far) })
		}
	})
	return c
}

func (c *cut) addr() string { return c.l.Addr().String() }

func (c *cut) cut() {
	c.l.Close()
	c.mu.Lock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
}

// TestPortForwardChannels: the ports that the request names, on two channels each.
func TestPortForwardChannels(t *testing.T) {
	h := newHarness(t)
	id := h.run(h.podConfig("p"))
	p, err := h.index.pod(id)
	if err != nil {
		t.Fatal(err)
	}
	x := &forwarding{harness: h, pod: p}
	defer x.serve("127.0.0.1:7777", func(conn *net.TCPConn) {
		buf := make([]byte, 4)
		_, _ = io.ReadFull(conn, buf)
		fmt.Fprintf(conn, "echo %s", buf)
	})()
	resp, err := h.PortForward(h.ctx(), &runtimeapi.PortForwardRequest{PodSandboxId: id, Port: []int32{7777, 7779}})
	if err != nil {
		t.Fatal(err)
	}
	dialer := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}}
	ws, answer, err := dialer.Dial(strings.Replace(resp.Url, "http:", "ws:", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	answer.Body.Close()
	if err := ws.WriteMessage(websocket.BinaryMessage, []byte("\x00ping")); err != nil {
		t.Fatal(err)
	}
	got := make([]bytes.Buffer, 4)
	for {
		_, raw, err := ws.ReadMessage()
		if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			break
		}
		if err != nil || len(raw) == 0 || int(raw[0]) >= len(got) {
			t.Fatalf("%q, %v", raw, err)
		}
		got[raw[0]].Write(raw[1:])
	}
	for channel, want := range []string{"echo ping", "", "", "forward to port 7779 of pod " + id + ": nothing listens there, on 127.0.0.1 or ::1"} {
		port := string(binary.LittleEndian.AppendUint16(nil, []uint16{7777, 7779}[channel/2]))
		if got := got[channel].String(); got != port+want {
			t.Errorf("channel %d: %q", channel, got)
		}
	}
}

// TestPortForwardUnread: what a client sends on a connection that the pod has ended is in nobody's way.
func TestPortForwardUnread(t *testing.T) {
	eachForward(t, func(t *testing.T, x *forwarding) {
		defer x.serve("127.0.0.1:7777", echo)()
		defer x.serve("127.0.0.1:7778", func(conn *net.TCPConn) { fmt.Fprint(conn, "bye") })()
		conn, _, err := x.dialer().Dial("portforward.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ended, _, err := pair(conn, "7778", "0")
		if err != nil {
			t.Fatal(err)
		}
		if raw, err := io.ReadAll(ended); string(raw) != "bye" || err != nil {
			t.Errorf("%q, %v", raw, err)
		}
		for range 1000 {
			if _, err := ended.Write(make([]byte, 32<<10)); err != nil {
				t.Fatal(err)
			}
		}
		data, _, err := pair(conn, "7777", "1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(data, "ping"); err != nil {
			t.Fatal(err)
		}
		data.Close()
		if raw, err := io.ReadAll(data); string(raw) != "echo ping" || err != nil {
			t.Errorf("%q, %v", raw, err)
		}
	})
}
