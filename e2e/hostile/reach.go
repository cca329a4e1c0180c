package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// reachEnv names what listens on the host, and where it may be looked for: "NAME NETWORK PORT", a comma between two.
const reachEnv = "HOSTILE_REACH"

// reachWord is what each of them answers.
const reachWord = "of the host's"

// reachable are the addresses that lead somewhere from a pod, or might: loopback, the user-mode network's gateway, its
// resolver, a neighbour and all of them, the node, the pods' gateway; by IPv6 the same, and the host's own.
var reachable = []string{"127.0.0.1", "127.0.0.53", hostAlias, resolver, "10.0.2.4", "10.0.2.255", "255.255.255.255", node, gateway,
	"198.51.100.10", "::1", "fd00::2", "fd00::3", "fd63:6f72:6163:6c65::1", "fe80::2%eth0"}

const (
	reachLongest = 20 * time.Second // for what is expected to answer
	reachLonger  = 2 * time.Second  // for the rest, afterwards
)

// reach tries everything at every address, all at once, until what is expected has answered, and for a while longer.
func reach(expected []string) {
	ctx, cancel := context.WithTimeout(context.Background(), reachLongest)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	missing := slices.Clone(expected)
	try := func(name string, attempt func(context.Context) error) {
		wg.Go(func() {
			err := attempt(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fmt.Printf("%s\tkept\t%v\n", name, err)
				return
			}
			fmt.Printf("%s\tthrough\t\n", name)
			if missing = slices.DeleteFunc(missing, func(m string) bool { return m == name }); len(missing) == 0 {
				time.AfterFunc(reachLonger, cancel)
			}
		})
	}
	for _, target := range strings.Split(os.Getenv(reachEnv), ",") {
		var name, network, port string
		if n, err := fmt.Sscan(target, &name, &network, &port); n != 3 {
			fmt.Printf("%s: %q: %v\n", reachEnv, target, err)
			return
		}
		for _, at := range reachable {
			try(name+" at "+at, func(ctx context.Context) error { return converse(ctx, network, net.JoinHostPort(at, port)) })
		}
		if network == "udp" {
			wg.Go(func() { smuggle(ctx, name, port) })
		}
	}
	wg.Wait()
	fmt.Println("end")
}

// converse asks again and again, until something answers with the word or ctx ends.
func converse(ctx context.Context, network, addr string) error {
	for {
		err := ask(ctx, network, addr)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func ask(ctx context.Context, network, addr string) error {
	if network == "http" {
		return askStream(ctx, addr)
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return err
	}
	answer := make([]byte, 100)
	n, err := conn.Read(answer)
	if err == nil && string(answer[:n]) != reachWord {
		err = fmt.Errorf("it is another: %q", answer[:n])
	}
	return err
}

// askStream: the streaming server is there, and gives nothing without a token.
func askStream(ctx context.Context, addr string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/exec/AAAAAAAAAAAAAAAAAAAAAAAAAA", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusNotFound {
		return errors.New(resp.Status)
	}
	return nil
}
