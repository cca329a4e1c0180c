package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// gateway, node and resolver are addresses that every pod reaches; the host's loopback would be at 10.0.2.2.
const (
	gateway   = "10.88.0.1"
	node      = "10.0.2.100"
	resolver  = "10.0.2.3"
	hostAlias = "10.0.2.2"
)

// network are the ways by which something of the host's or the node's would answer.
func network() []attempt {
	var out []attempt
	for _, at := range []string{"127.0.0.1", hostAlias, gateway, node, resolver} {
		out = append(out, attempt{"host's loopback at " + at, func() (string, error) { return connect(at, hostPortEnv) }})
	}
	for _, at := range []string{"127.0.0.1", hostAlias, gateway, node} {
		out = append(out,
			attempt{"streaming port at " + at, func() (string, error) { return connect(at, streamPortEnv) }},
			attempt{"stream without a token at " + at, func() (string, error) { return stream(at) }})
	}
	return append(out,
		attempt{"abstract socket of the host", abstract},
		attempt{"abstract sockets of the node", abstractNames})
}

func connect(host, portEnv string) (string, error) {
	port, err := given(portEnv)
	if err != nil {
		return "", err
	}
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(host, port), 2*time.Second)
	if err != nil {
		return "", err
	}
	return "connected", conn.Close()
}

// stream asks the streaming server for what it would give to who has a token.
func stream(host string) (string, error) {
	port, err := given(streamPortEnv)
	if err != nil {
		return "", err
	}
	client := http.Client{Timeout: 2 * time.Second}
	for _, path := range []string{"/", "/exec/", "/exec/AAAAAAAAAAAAAAAAAAAAAAAAAA", "/attach/..%2f", "/debug/pprof/"} {
		resp, err := client.Get("http://" + net.JoinHostPort(host, port) + path)
		if err != nil {
			return "", err
		}
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 100))
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			return fmt.Sprintf("%s: %s %s", path, resp.Status, said), nil
		}
	}
	return "", errors.New("not found")
}

func abstract() (string, error) {
	name, err := given(abstractEnv)
	if err != nil {
		return "", err
	}
	conn, err := net.DialTimeout("unix", "@"+name, time.Second)
	if err != nil {
		return "", err
	}
	return "connected", conn.Close()
}

// abstractNames are the names that this network namespace has.
func abstractNames() (string, error) {
	raw, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		return "", err
	}
	var names []string
	for line := range bytes.Lines(raw) {
		if f := strings.Fields(string(line)); len(f) == 8 && strings.HasPrefix(f[7], "@") {
			names = append(names, f[7])
		}
	}
	if len(names) == 0 {
		return "", errAbsent
	}
	return strings.Join(names, " "), nil
}

// greet tells whether a socket of the node answers, or keeps, this user: it speaks to each as its clients do.
func greet(path string) error {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	hello := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" // RFC 9113, with empty settings
	switch {
	case strings.HasSuffix(path, "keeper.sock"):
		body := `{"op":"list"}`
		hello = string([]byte{0, 0, 0, byte(len(body))}) + body
	case strings.HasSuffix(path, "admin.sock"):
		hello = "GET / HTTP/1.0\r\n\r\n"
	case strings.HasSuffix(path, "ports.sock"), strings.HasSuffix(path, "api.sock"):
		hello = "GET /v1/ports HTTP/1.0\r\n\r\n"
	case strings.HasSuffix(path, ".bp.sock"): // a request of RootlessKit's port driver, whose length comes first
		body := `{"Type":"init"}`
		hello = string([]byte{byte(len(body)), 0, 0, 0}) + body
	}
	if _, err := io.WriteString(conn, hello); err != nil {
		return err
	}
	answer := make([]byte, 512)
	n, err := conn.Read(answer)
	if n == 0 {
		return fmt.Errorf("no answer: %w", err)
	}
	if said := string(answer[:n]); strings.Contains(said, "ports are published by the node alone") {
		return errors.New(said)
	} else if strings.Contains(said, "may not use") {
		return errors.New(string(answer[4:n]))
	}
	return nil
}
