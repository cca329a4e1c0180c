package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
)

// Client is who has come, and its ends of the streams. A nil stream was not asked for. Reads of Stdin end at the
// latest with the session.
type Client struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Sizes has the latest size of the client's terminal; nil without one. It is not closed.
	Sizes <-chan Size

	wg     sync.WaitGroup
	defect func(error) // ends the session; nil has none to end
}

// Size is that of a terminal, in characters.
type Size struct{ Width, Height uint16 }

// Go runs fn beside the session, which waits for it once its streams are closed and its context has ended.
func (c *Client) Go(fn func()) { c.wg.Go(func() { c.Guard(fn) }) }

// Guard calls fn. A panic ends the session, whose client is told.
func (c *Client) Guard(fn func()) {
	if err := Guard(func() error { fn(); return nil }); err != nil && c.defect != nil {
		c.defect(err)
	}
}

// ExitError is the exit code, not 0, of a command that was run.
type ExitError int

func (e ExitError) Error() string { return "command terminated with exit code " + strconv.Itoa(int(e)) }

// wanted are the streams that the CRI's request names.
type wanted struct{ stdin, stdout, stderr, tty bool }

// wire is one exec or attach as a protocol carries it.
type wire struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	resize         io.Reader   // JSON
	failure        io.Writer   // the stream that tells how it ended
	text           bool        // before v4 failure takes a sentence, and nothing is success
	gone           <-chan bool // closed when the client has ended the session
	close          func()      // ends the reads, and the connection; the client gets what was written before
}

// serveRemote serves one exec or attach. The client gets its answer by the wire.
func (s *Server) serveRemote(w http.ResponseWriter, r *http.Request, want wanted, run func(context.Context, *Client) error) {
	accept := acceptSPDY
	if websocket.IsWebSocketUpgrade(r) {
		accept = acceptChannels
	}
	wire, err := accept(w, r, want)
	if err != nil {
		s.log.Debug("streaming client turned away", "kind", r.PathValue("kind"), "error", err)
		return
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	client := &Client{Stdin: wire.stdin, Stdout: wire.stdout, Stderr: wire.stderr, defect: s.defect(r.PathValue("kind"), cancel)}
	client.Go(func() {
		select {
		case <-wire.gone:
			cancel(errClientGone)
		case <-ctx.Done():
		}
	})
	client.Go(func() { connOf(ctx).watch(ctx) })
	if wire.resize != nil {
		sizes := make(chan Size, 1)
		client.Go(func() { readSizes(wire.resize, sizes) })
		if want.tty {
			client.Sizes = sizes
		}
	}
	err = Guard(func() error { return reason(ctx, run(ctx, client)) })
	if defect := (*Defect)(nil); errors.As(err, &defect) {
		client.defect(defect)
	}
	if errors.Is(err, errClientGone) {
		connOf(ctx).kill() // nobody is to be told, and nothing is to wait for it
	}
	if err := wire.tell(err); err != nil {
		s.log.Debug("streaming client not told", "kind", r.PathValue("kind"), "error", err)
	}
	wire.close()
	cancel(nil)
	client.wg.Wait()
}

// defect returns what ends a session of that kind for a defect of ours, and says it in the log.
func (s *Server) defect(kind string, cancel context.CancelCauseFunc) func(error) {
	var once sync.Once
	return func(err error) {
		once.Do(func() {
			if defect := (*Defect)(nil); errors.As(err, &defect) {
				s.log.Error("panic", "kind", kind, "reason", defect.Reason, "stack", string(defect.Stack))
			}
			cancel(err)
		})
	}
}

// reason puts what ended the session in place of the error that came of it: a cancelled call, or a command that was
// killed for it.
func reason(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// readSizes keeps the latest size in sizes, whether or not somebody takes it.
func readSizes(r io.Reader, sizes chan Size) {
	for decoder := json.NewDecoder(r); ; {
		var size Size
		if decoder.Decode(&size) != nil {
			// Not JSON, or the end. What else comes is not for us, but would hold the other streams up.
			_, _ = io.Copy(io.Discard, r)
			return
		}
		if size.Width == 0 || size.Height == 0 {
			continue
		}
		select {
		case <-sizes: // out of date
		default:
		}
		sizes <- size // has room: nobody else sends
	}
}

// status is as much of a Kubernetes metav1.Status as clients read.
type status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func statusOf(err error) status {
	var exit ExitError
	switch {
	case err == nil:
		return status{Status: "Success"}
	case errors.As(err, &exit):
		return status{Status: "Failure", Reason: "NonZeroExitCode", Message: exit.Error(),
			Details: &details{[]cause{{"ExitCode", strconv.Itoa(int(exit))}}}}
	default:
		return status{Status: "Failure", Reason: "InternalError", Message: sentence(err), Code: http.StatusInternalServerError}
	}
}

// sentence is an error in one line.
func sentence(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// tell says how it ended.
func (w *wire) tell(err error) error {
	if w.text {
		if err == nil {
			return nil
		}
		_, err = io.WriteString(w.failure, sentence(err))
		return err
	}
	raw, err := json.Marshal(statusOf(err))
	if err != nil {
		return err
	}
	_, err = w.failure.Write(raw)
	return err
}
