package streaming

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	// ticketLife is how long a URL waits for its client.
	ticketLife = time.Minute
	// maxTickets bounds the memory of requests whose client does not come.
	maxTickets = 1000
)

// ErrTooMany is that as many URLs as are kept wait for their clients.
var ErrTooMany = errors.New("1000 streaming URLs wait for their clients already")

// ticket is a request that waits for its client.
type ticket struct {
	kind    string // exec, attach or portforward: the URL's path says it too
	serve   http.HandlerFunc
	expires time.Time
}

// tickets are kept by their tokens. Whoever can connect to the port may try tokens, so they have 130 random bits.
// They are kept and looked for by their digests: how long it takes to compare two of those says nothing of how much of a
// guess was right.
type tickets struct {
	mu   sync.Mutex
	open map[digest]ticket
}

type digest = [sha256.Size]byte

// issue returns the token by which serve is called, once, by whoever brings it first.
func (t *tickets) issue(kind string, serve http.HandlerFunc) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for key, old := range t.open {
		if now.After(old.expires) {
			delete(t.open, key)
		}
	}
	if len(t.open) >= maxTickets {
		return "", ErrTooMany
	}
	token := rand.Text()
	t.open[sha256.Sum256([]byte(token))] = ticket{kind: kind, serve: serve, expires: now.Add(ticketLife)}
	return token, nil
}

// redeem takes the ticket away, whatever comes of it.
func (t *tickets) redeem(kind, token string) (http.HandlerFunc, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := sha256.Sum256([]byte(token))
	found, ok := t.open[key]
	delete(t.open, key)
	if !ok || found.kind != kind || time.Now().After(found.expires) {
		return nil, false
	}
	return found.serve, true
}
