package main

import (
	"errors"
	"log/slog"
	"net"
	"os"

	"github.com/coracle-cri/coracle/rootless/peercred"
)

// ownListener gives connections of this process's own user only, as its user namespace sees who connected
// (SO_PEERCRED, unix(7)): the user who started the node, whose id is 0 in it, and so also root in a pod that was given
// the socket by a hostPath. Other ids of pods are others, and so is root on the host, whom the namespace does not know.
type ownListener struct {
	*net.UnixListener
	log *slog.Logger
}

// Accept answers nobody else: their connections are closed, and the log says whose they were.
func (l ownListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peercred.UID(conn)
		if err == nil && uid == uint32(os.Geteuid()) {
			return conn, nil
		}
		l.log.Warn("connection refused: the socket is for the user who started the node", "socket", l.Addr(), "uid", uid,
			"err", errors.Join(err, conn.Close()))
	}
}
