package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// listenVar says where the web servers listen, in the image's configuration; the default is port 80.
const listenVar = "LISTEN"

// nginx serves a page, writes the pid file of nginx and calls itself as nginx's master process does.
func nginx(args []string) int {
	if !strings.Contains(args[0], ":") {
		return become("nginx: master process " + strings.Join(args, " "))
	}
	return serve("nginx", func() error {
		return os.WriteFile("/var/run/nginx.pid", []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644)
	})
}

// httpd serves a page, and says in its log who it is.
func httpd(args []string) int {
	return serve("httpd", func() error {
		_, err := fmt.Fprintf(os.Stderr, "[core:notice] [pid %d] Command line: '%s'\n", os.Getpid(), strings.Join(args, " "))
		return err
	})
}

// serve answers every request with a page until it is told to end. ready is called once it listens.
func serve(name string, ready func() error) int {
	address := os.Getenv(listenVar)
	if address == "" {
		address = ":80"
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return complain(name, err)
	}
	if err := ready(); err != nil {
		return complain(name, err)
	}
	server := http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "welcome to "+name+"\n")
		fmt.Println(r.RemoteAddr, r.Method, r.URL.Path)
	})}
	go func() { _ = server.Serve(l) }() // ends with the process
	waitForEnd()
	return 0
}
