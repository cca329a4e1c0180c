package netslirp

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"unicode"
)

// ResolvConf returns the text of a pod's resolv.conf.
//
// Without servers the pod resolves as the host does: the user-mode network's DNS address hands each query to
// what the host's resolv.conf names at that moment, also where that is 127.0.0.53 or changes with a VPN; search
// domains and options that are not given are the host's. A server that is given and is a loopback address, which
// would be the pod's own, is replaced by that address too.
func (n *Network) ResolvConf(servers, searches, options []string) (string, error) {
	host, err := readResolvConf(n.cfg.HostResolvConf)
	if err != nil {
		return "", err
	}
	if len(servers) == 0 {
		servers = host.servers
		if n.cfg.DNS != "" {
			servers = []string{n.cfg.DNS}
		}
		if len(searches) == 0 {
			searches = host.searches
		}
		if len(options) == 0 {
			options = host.options
		}
	}
	var names []string
	for _, s := range servers {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return "", fmt.Errorf("DNS server %q: %w: %w", s, ErrInvalid, err)
		}
		if addr.IsLoopback() || addr.IsUnspecified() {
			if n.cfg.DNS == "" {
				continue
			}
			s = n.cfg.DNS
		}
		if !slices.Contains(names, s) {
			names = append(names, s)
		}
	}
	if len(names) == 0 {
		return "", fmt.Errorf("DNS servers: none can be reached from a pod: %w", ErrInvalid)
	}
	return formatResolvConf(names, searches, options)
}

// formatResolvConf refuses words that would be several, or a line of their own.
func formatResolvConf(servers, searches, options []string) (string, error) {
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	for _, line := range []struct {
		key   string
		words []string
	}{{"search", searches}, {"options", options}} {
		var words []string
		for _, w := range line.words {
			if w == "" || strings.ContainsFunc(w, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
				return "", fmt.Errorf("DNS %s %q: %w", line.key, w, ErrInvalid)
			}
			if !slices.Contains(words, w) {
				words = append(words, w)
			}
		}
		if len(words) > 0 {
			fmt.Fprintf(&b, "%s %s\n", line.key, strings.Join(words, " "))
		}
	}
	return b.String(), nil
}

// resolvConf is what resolv.conf(5) says that matters here.
type resolvConf struct{ servers, searches, options []string }

// readResolvConf reads the host's file. A host without one has no names, which is no error.
func readResolvConf(path string) (resolvConf, error) {
	var c resolvConf
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || path == "" {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read the host's resolv.conf: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			c.servers = append(c.servers, words[1])
		case "search", "domain": // the last of both wins
			c.searches = words[1:]
		case "options":
			c.options = append(c.options, words[1:]...)
		}
	}
	return c, nil
}
