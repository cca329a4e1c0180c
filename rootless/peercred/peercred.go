// Package peercred tells who is at the other end of a unix socket. The daemon's sockets, the keeper's and the port driver's all
// ask for it; it is a package of its own since none of these may import another's.
package peercred

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// UID returns the peer's effective user id when it connected, as this user namespace sees it (SO_PEERCRED, unix(7)).
func UID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("get peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("get peer credentials: %w", err)
	}
	if cerr != nil {
		return 0, fmt.Errorf("get peer credentials: %w", cerr)
	}
	return cred.Uid, nil
}
