package netslirp

import (
	"errors"
	"os"
	"sync"

	"github.com/google/nftables"
)

// ruleset is the nftables of a network namespace, by a socket that stays open: the kernel frees what a transaction has
// deleted some 10 ms later, and whoever closes such a socket meanwhile waits for it, and all others with him.
type ruleset struct {
	ns *os.File

	mu   sync.Mutex     // a transaction is in hand
	conn *nftables.Conn // nil before the first, and after an error, when it is out of step with its answers
}

// transaction sends what fill adds, all or nothing.
func (r *ruleset) transaction(fill func(*nftables.Conn) error) (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		// The socket is of the namespace of the thread that makes it.
		err = inNetNS(r.ns, func() (err error) {
			r.conn, err = nftables.New(nftables.AsLasting())
			return err
		})
		if err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.closeLocked())
		}
	}()
	if err := fill(r.conn); err != nil {
		return err
	}
	return r.conn.Flush()
}

func (r *ruleset) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closeLocked()
}

func (r *ruleset) closeLocked() error {
	if r.conn == nil {
		return nil
	}
	conn := r.conn
	r.conn = nil
	return conn.CloseLasting()
}
