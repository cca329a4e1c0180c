// Package streaming serves exec, attach and port-forward over HTTP to whoever brings a URL that the CRI gave out.
//
// Nouns:
//
//   - Server: the listeners, the tickets, the connections, and every goroutine of the package.
//   - ticket: what the token of a URL is good for, once, and for a minute.
//   - conn: a client's connection; it notices when the client goes, and ends without losing what was sent.
//   - wire: the streams of one exec or attach, as SPDY (spdyStreams) or a WebSocket (channels) carries them.
//   - Client: the same for the Runtime, which does not see the protocol. Port-forward makes one for each connection.
//
// What is spoken, and by whom: SPDY/3.1 with v2 to v4.channel.k8s.io (kubectl by way of API server and kubelet,
// crictl), a WebSocket with v5.channel.k8s.io (crictl; v5 can close stdin) or an earlier version (clients of other
// languages, whose WebSockets API server and kubelet pass on as they are), and for port-forward SPDY, SPDY inside
// a WebSocket (tunnel), and a WebSocket with two channels for each port.
//
// A session ends with its client, with the Runtime's work, or with the Server; there is no limit on how long it may
// be silent. Its context says by its cause which it was.
//
// Locks are leaves: Server.mu, tickets.mu, forwarder.mu and channels.mu are never held together.
package streaming
