package images

import (
	"fmt"
	"net"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	dockerHub     = "docker.io"
	defaultTag    = "latest"
	minIDPrefix   = 3
	maxRefLength  = 1024
	dockerHubHost = name.DefaultRegistry
)

// reference is an image's name in its canonical form: docker.io/library/busybox:latest, repo@digest, or both.
type reference struct {
	Host   string // registry host as people write it: "docker.io", "localhost:5000"
	Path   string // repository in that registry: "library/busybox"
	Tag    string // "" only where there is a digest
	Digest string // "" or "sha256:…"
}

// parseReference reads an image name as every engine does: no registry is docker.io, no namespace there is
// library, neither tag nor digest is :latest. With both, the digest decides what is pulled and the tag is only
// a remark of the user's: it is kept out of the image's names, since it may point elsewhere.
func parseReference(s string) (reference, error) {
	if s == "" {
		return reference{}, fmt.Errorf("%w: image reference is empty", ErrInvalid)
	}
	if len(s) > maxRefLength || strings.Contains(s, "://") {
		if strings.Contains(s, "://") {
			s = bareURL(s)
		}
		return reference{}, fmt.Errorf("%w: image reference %.80q: give registry/repository[:tag][@digest], without a scheme", ErrInvalid, withoutUser(s))
	}
	base, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest {
		if _, err := v1.NewHash(digest); err != nil {
			return reference{}, fmt.Errorf("%w: image reference %q: bad digest", ErrInvalid, withoutUser(s))
		}
	}
	tag, err := name.NewTag(base, name.WithDefaultTag(""))
	if err != nil {
		return reference{}, fmt.Errorf("%w: image reference %q: %w", ErrInvalid, s, err)
	}
	ref := reference{Host: displayHost(tag.RegistryStr()), Path: tag.RepositoryStr(), Tag: tag.TagStr(), Digest: digest}
	if ref.Tag == "" && digest == "" {
		ref.Tag = defaultTag
	}
	return ref, nil
}

// withoutUser drops, for an error, what may be a user and a password before a host: no reference has them, and somebody who
// knows them from URLs may have typed them.
func withoutUser(s string) string {
	at := strings.LastIndexByte(s, '@')
	if at < 0 || strings.HasPrefix(s[at+1:], "sha") {
		return s
	}
	return "…" + s[at:]
}

// displayHost gives Docker Hub the name that users write, whichever of its hosts was meant.
func displayHost(host string) string {
	switch host {
	case dockerHubHost, "registry-1.docker.io", "www.docker.io":
		return dockerHub
	}
	return host
}

// Name is the repository with its registry.
func (r reference) Name() string { return r.Host + "/" + r.Path }

// Tagged is the canonical name by tag.
func (r reference) Tagged() string { return r.Name() + ":" + r.Tag }

// Digested is the canonical name by the given digest.
func (r reference) Digested(digest string) string { return r.Name() + "@" + digest }

// Identifier is what the registry is asked for: the digest where there is one, else the tag.
func (r reference) Identifier() string {
	if r.Digest != "" {
		return r.Digest
	}
	return r.Tag
}

func (r reference) String() string {
	if r.Digest != "" {
		return r.Digested(r.Digest)
	}
	return r.Tagged()
}

var (
	hexPattern = regexp.MustCompile(`^[0-9a-f]{3,64}$`)
	idPattern  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)
)

// idPrefix returns the hex digits of s where s may be (the beginning of) an image id.
func idPrefix(s string) (prefix string, ok bool) {
	prefix = strings.TrimPrefix(s, "sha256:")
	return prefix, len(prefix) >= minIDPrefix && hexPattern.MatchString(prefix)
}

// checkOwnerID keeps an id that becomes a directory's name from being a path.
func checkOwnerID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w: id %.80q: want letters, digits, _ . -", ErrInvalid, id)
	}
	return nil
}

// isLoopback tells whether a registry host is this machine by its name or number.
func isLoopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
