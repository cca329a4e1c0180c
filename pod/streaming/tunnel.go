package streaming

import (
	"errors"
	"io"
	"net"
	"time"

	"github.com/gorilla/websocket"
)

// tunnelPrefix precedes, in the name of a WebSocket's protocol, that of a SPDY connection inside.
const tunnelPrefix = "SPDY/3.1+"

// tunnel is the byte stream inside a WebSocket: one reader and one writer at a time, as the SPDY library has them.
type tunnel struct {
	*websocket.Conn
	message io.Reader // what is left of a message; nil between two
}

func newTunnel(ws *websocket.Conn) *tunnel {
	ws.SetPingHandler(func(data string) error {
		return ws.WriteControl(websocket.PongMessage, []byte(data), time.Time{}) // see channels.beat
	})
	return &tunnel{Conn: ws}
}

func (t *tunnel) Read(p []byte) (int, error) {
	for {
		if t.message == nil {
			kind, message, err := t.NextReader()
			if websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway) {
				return 0, io.EOF
			}
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errors.New("read from tunnel: a message of text")
			}
			t.message = message
		}
		n, err := t.message.Read(p)
		if errors.Is(err, io.EOF) {
			t.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (t *tunnel) Write(p []byte) (int, error) {
	if err := t.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (t *tunnel) Close() error {
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = t.WriteControl(websocket.CloseMessage, bye, time.Time{}) // the client may have gone
	return t.Conn.Close()
}

func (t *tunnel) SetDeadline(at time.Time) error {
	return errors.Join(t.SetReadDeadline(at), t.SetWriteDeadline(at))
}

var _ net.Conn = (*tunnel)(nil)
