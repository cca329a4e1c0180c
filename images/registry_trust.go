package images

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// trust sends each request on by the connections that fit the host that it goes to. Plain http, and certificates that
// nobody vouches for, are for hosts, with their ports, of which the configuration says so, and for this machine's own: not
// for where such a host leads to, by its token server, by a redirect or with its blobs. What it names over verified https
// is believed as far as itself: that is how registries work. So where it redirects a blob to plain http, that is followed: no
// credentials go there, and what comes has to have its digest.
type trust struct {
	pool *transports
	at   endpoint
}

func (t *trust) RoundTrip(req *http.Request) (*http.Response, error) {
	to := t.pool.leads(t.at, req.URL)
	if req.URL.Scheme == "http" && !to.insecure && !t.blobInClear(req) {
		return nil, fmt.Errorf("%w: %s: plain http is not allowed, to which %s leads: give %s a section in registries with insecure: true if it is to be used",
			errMisled, req.URL.Host, t.at, req.URL.Host)
	}
	if from := req.Response; from != nil && req.Body != nil && from.Request.URL.Host != req.URL.Host {
		// An identity token is sent in the body, which http.Client would send again.
		return nil, fmt.Errorf("%w: the token server %s redirects to %s, which would get the credentials", errMisled, from.Request.URL.Host, req.URL.Host)
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

// blobInClear tells whether a request without credentials is for a blob that somebody whose certificate was verified
// redirects.
func (t *trust) blobInClear(req *http.Request) bool {
	first := req
	for first.Response != nil {
		first = first.Response.Request
	}
	by := t.pool.leads(t.at, first.URL)
	return req.Header.Get("Authorization") == "" && req.Body == nil && first.URL.Scheme == "https" && (!by.insecure || by.caFile != "") &&
		strings.Contains(first.URL.Path, "/blobs/")
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
