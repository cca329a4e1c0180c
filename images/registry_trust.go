package images

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
)

// trust sends each request on by the connections that fit the host that it goes to. Plain http, and certificates that
// nobody vouches for, are for hosts, with their ports, of which the configuration says so, and for this machine's own: not
// for where such a host leads to, by its token server, by a redirect or with its blobs. What it names over verified https
// is believed as far as itself: that is how registries work.
type trust struct {
	pool *transports
	at   endpoint
}

func (t *trust) RoundTrip(req *http.Request) (*http.Response, error) {
	to := t.pool.leads(t.at, req.URL)
	if req.URL.Scheme == "http" && !to.insecure {
		return nil, fmt.Errorf("%s: plain http is not allowed, to which %s leads: give %s a section in registries with insecure: true if it is to be used",
			req.URL.Host, t.at, req.URL.Host)
	}
	if from := req.Response; from != nil && req.Body != nil && from.Request.URL.Host != req.URL.Host {
		// An identity token is sent in the body, which http.Client would send again.
		return nil, fmt.Errorf("%w: the token server %s redirects to %s, which would get the credentials", ErrRefused, from.Request.URL.Host, req.URL.Host)
	}
	tr, err := t.pool.get(to)
	if err != nil {
		return nil, err
	}
	resp, err := tr.RoundTrip(req)
	if bad := (*tls.CertificateVerificationError)(nil); errors.As(err, &bad) {
		err = fmt.Errorf("%s: %w: give %s a section in registries, with caFile for the authority that vouches for it, or with insecure: true",
			req.URL.Host, err, req.URL.Host)
	}
	return resp, err
}

// leads tells how a host is reached that a request for an endpoint goes to. A section of its own counts; an authority
// trusted for the registry is trusted for what it leads to, too.
func (t *transports) leads(at endpoint, u *url.URL) endpoint {
	addr := address(u)
	if ownAddresses(at.host)[addr] {
		return at
	}
	to := endpoint{host: at.host, insecure: isLoopback(u.Host), caFile: at.caFile}
	rc, ok := t.lookUp(addr)
	if host, port, err := net.SplitHostPort(addr); !ok && err == nil && port == defaultPorts[u.Scheme] {
		rc, ok = t.lookUp(host)
	}
	if !ok {
		return to
	}
	to.insecure = to.insecure || rc.Insecure
	if rc.CAFile != "" || rc.Insecure {
		to.caFile = rc.CAFile
	}
	return to
}

var defaultPorts = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}

// address is a URL's host:port.
func address(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = defaultPorts[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}
