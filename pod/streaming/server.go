package streaming

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime does what clients come for. Its methods run at once for different clients. When ctx ends they are to return
// soon; context.Cause says why it did.
type Runtime interface {
	// Exec runs a command to its end. ExitError is the command's own; any other error is told to the client.
	Exec(ctx context.Context, req *runtimeapi.ExecRequest, client *Client) error
	// Attach joins a container's own streams until it ends.
	Attach(ctx context.Context, req *runtimeapi.AttachRequest, client *Client) error
	// PortForward carries one connection to a port of a pod.
	PortForward(ctx context.Context, podID string, port uint16, client *Client) error
}

var (
	errShutdown   = errors.New("the daemon is shutting down")
	errClientGone = errors.New("the client has gone")
)

// farewell is how long sessions may take, when the server closes, to tell their clients.
const farewell = 2 * time.Second

// Server gives out URLs and serves them.
type Server struct {
	runtime Runtime
	log     *slog.Logger
	addr    string
	tickets tickets
	https   []*http.Server // one a listener
	ctx     context.Context
	cancel  context.CancelCauseFunc

	mu       sync.Mutex // guards what follows, and additions to the groups
	closed   bool
	conns    map[*conn]struct{}
	sessions sync.WaitGroup
	wg       sync.WaitGroup // listeners, and connections that linger
}

// Serve begins to serve on two listeners of the same port. Browsers are on the host's side, so a request there that
// comes from another page than ours (there is none) is refused, token or not. Inside the node are kubelets, which
// pass on the Host and the Origin of whoever came to the API server; some clients send one that are no browsers.
func Serve(runtime Runtime, log *slog.Logger, host, node net.Listener) *Server {
	s := &Server{runtime: runtime, log: log, addr: host.Addr().String(), conns: map[*conn]struct{}{}}
	s.tickets.open = map[digest]ticket{}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	mux := http.NewServeMux()
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		mux.HandleFunc(method+" /{kind}/{token}", s.redeem)
	}
	s.listen(host, s.noPages(mux))
	s.listen(node, mux)
	return s
}

func (s *Server) listen(l net.Listener, handler http.Handler) {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return s.ctx },
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return c.(*conn).bind(ctx) },
	}
	s.https = append(s.https, server)
	s.wg.Go(func() {
		if err := server.Serve(listener{l, s}); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("streaming server ended", "address", l.Addr(), "error", err)
		}
	})
}

// noPages refuses pages of a browser. It lets them open WebSockets to any address, and says where they are from. And
// where a page has made its own name lead here (DNS rebinding), for the browser the server is the page's own, and it
// says that name: who was given our URL came by an address.
func (s *Server) noPages(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !byAddress(r.Host) {
			http.Error(w, "nobody is told to come here by the name "+strconv.Quote(r.Host), http.StatusForbidden)
			return
		}
		for _, origin := range r.Header.Values("Origin") {
			if origin != "http://"+s.addr {
				http.Error(w, "a page of "+origin+" may not use this runtime", http.StatusForbidden)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// byAddress tells whether a Host header is no name, or the one name that leads here on every machine (RFC 6761).
func byAddress(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost"
}

// Addr is the host:port of every URL.
func (s *Server) Addr() string { return s.addr }

// ExecURL returns a URL for one exec.
func (s *Server) ExecURL(req *runtimeapi.ExecRequest) (string, error) {
	want := wanted{stdin: req.GetStdin(), stdout: req.GetStdout(), stderr: req.GetStderr(), tty: req.GetTty()}
	return s.url("exec", func(w http.ResponseWriter, r *http.Request) {
		s.serveRemote(w, r, want, func(ctx context.Context, c *Client) error { return s.runtime.Exec(ctx, req, c) })
	})
}

// AttachURL returns a URL for one attach.
func (s *Server) AttachURL(req *runtimeapi.AttachRequest) (string, error) {
	want := wanted{stdin: req.GetStdin(), stdout: req.GetStdout(), stderr: req.GetStderr(), tty: req.GetTty()}
	return s.url("attach", func(w http.ResponseWriter, r *http.Request) {
		s.serveRemote(w, r, want, func(ctx context.Context, c *Client) error { return s.runtime.Attach(ctx, req, c) })
	})
}

// PortForwardURL returns a URL for one session of any number of connections. Ports of the request are for clients
// that name none themselves.
func (s *Server) PortForwardURL(req *runtimeapi.PortForwardRequest) (string, error) {
	return s.url("portforward", func(w http.ResponseWriter, r *http.Request) { s.servePortForward(w, r, req) })
}

func (s *Server) url(kind string, serve http.HandlerFunc) (string, error) {
	token, err := s.tickets.issue(kind, serve)
	if err != nil {
		return "", err
	}
	return "http://" + s.addr + "/" + kind + "/" + token, nil
}

func (s *Server) redeem(w http.ResponseWriter, r *http.Request) {
	serve, ok := s.tickets.redeem(r.PathValue("kind"), r.PathValue("token"))
	if !ok {
		http.Error(w, "this URL is unknown, was used, or is older than a minute: ask the runtime for another", http.StatusNotFound)
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		http.Error(w, errShutdown.Error(), http.StatusServiceUnavailable)
		return
	}
	s.sessions.Add(1)
	s.mu.Unlock()
	defer s.sessions.Done()
	if err := Guard(func() error { serve(w, r); return nil }); err != nil {
		s.defect(r.PathValue("kind"), func(error) {})(err)
		connOf(r.Context()).kill()
	}
}

// Close ends every session, tells the clients why, and waits for all goroutines.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(errShutdown)
	told := make(chan struct{})
	go func() { s.sessions.Wait(); close(told) }() // ends before this function does
	timer := time.NewTimer(farewell)
	defer timer.Stop()
	select {
	case <-told:
	case <-timer.C:
	}
	var errs []error
	for _, server := range s.https {
		errs = append(errs, server.Close())
	}
	s.mu.Lock()
	left := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		left = append(left, c)
	}
	s.mu.Unlock()
	for _, c := range left {
		c.kill()
	}
	<-told
	s.wg.Wait()
	return errors.Join(errs...)
}

func (s *Server) remember(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.conns[c] = struct{}{}
	}
	return !s.closed
}

func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// spawn runs fn as a goroutine that Close waits for.
func (s *Server) spawn(fn func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errShutdown
	}
	s.wg.Go(fn)
	return nil
}
