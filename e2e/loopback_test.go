package e2e

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
)

// TestHostLoopback: what listens on the host's loopback is not for pods, by any address or protocol; with the flag it is,
// at one address, and nothing more. What listens on another address of the host's is reached either way, which shows that
// the pods look in the right manner.
func TestHostLoopback(t *testing.T) {
	if hostileBin == "" {
		t.Fatal("CORACLE_E2E_HOSTILE does not name the program of e2e/hostile; to run these tests: make e2e")
	}
	if !box.Inside() {
		box.Run(t, box.Host{Names: map[string]string{"host.test": box.Address}})
		return
	}
	own := []string{"own-tcp at " + box.Address, "own-udp at " + box.Address}
	// By the node's 127.0.0.1, for who is in its network. Without a token nothing comes of it.
	inNode := append(slices.Clone(own), "streams at 127.0.0.1")
	loopback := []string{"tcp at 10.0.2.2", "udp at 10.0.2.2", "streams at 10.0.2.2"}
	for _, c := range []struct {
		name     string
		args     []string
		pod, net []string // what gets through from an ordinary pod, and from one in the node's network
	}{
		{"off", nil, own, inNode},
		{"on", []string{"--host-loopback"}, append(slices.Clone(own), loopback...), append(slices.Clone(inNode), loopback...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			streams := freePort(t)
			targets, arrived := listenEverywhere(t)
			targets = append(targets, "streams http "+streams)
			n, image := upWithBusybox(t, "default", append(c.args, "--streaming-address=127.0.0.1:"+streams)...)
			x := &target{node: n, image: image, env: map[string]string{"HOSTILE_REACH": strings.Join(targets, ",")}}
			found := map[string]func(){}
			for _, q := range []struct {
				quarter
				through []string
			}{{quarter{name: "pod"}, c.pod}, {quarter{name: "node", pod: namespaces("network")}, c.net}} {
				pod, file := x.runPod(q.name, object{"linux": object{"security_context": q.pod}})
				id := x.start(pod, file, q.name, x.image, x.hostile(q.quarter, "/hostile reach '"+strings.Join(q.through, "' '")+"'; exec sleep 1000"))
				found[q.name] = func() {
					x.awaitLog(id, "end")
					expectReached(t, q.name, x.crictl("logs", id), q.through)
				}
			}
			for _, look := range found {
				look()
			}
			n.expectListening(streams)
			arrived.expect(t, "own-udp frame to "+box.Address, "own-udp tap0 to "+box.Address, "own-udp eth0 to "+box.Address)
			n.down("--grace", "0s")
		})
	}
}

// expectListening: of all that a node has for its own, the streaming port alone has an address in the node's network.
func (n *node) expectListening(port string) {
	n.t.Helper()
	number, err := strconv.Atoi(port)
	if err != nil {
		n.t.Fatal(err)
	}
	var got []string
	r := n.coracle("enter", "--", "cat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6")
	for line := range strings.Lines(r.out) {
		const listens, unconnected = "0A", "07" // TCP_LISTEN, and the state of a datagram socket without a peer
		if f := strings.Fields(line); len(f) > 3 && (f[3] == listens || f[3] == unconnected) {
			got = append(got, f[1])
		}
	}
	if want := fmt.Sprintf("0100007F:%04X", number); r.code != 0 || len(got) != 1 || got[0] != want {
		n.t.Errorf("in the node's network there listen %q, want %s\n%s", got, want, r.out+r.errs)
	}
}

// smuggled are the datagrams that came to the host without having been asked for.
type smuggled struct {
	mu   sync.Mutex
	said map[string]bool
}

func (s *smuggled) add(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said[what] = true
}

// expect waits for those that may arrive, the last of which has gone long before: the others would be here too.
func (s *smuggled) expect(t *testing.T, want ...string) {
	t.Helper()
	slices.Sort(want)
	eventually(t, 30*time.Second, "what may arrive on the host, and nothing else, does", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if got := slices.Sorted(maps.Keys(s.said)); !slices.Equal(got, want) {
			return fmt.Errorf("there arrived %q, want %q", got, want)
		}
		return nil
	})
}

// listenEverywhere has something on each of the host's loopback addresses and on its own, by TCP and UDP.
func listenEverywhere(t *testing.T) (targets []string, arrived *smuggled) {
	t.Helper()
	arrived = &smuggled{said: map[string]bool{}}
	for name, addr := range map[string]string{"": "127.0.0.1:0", "resolver-": "127.0.0.53:0", "six-": "[::1]:0", "own-": box.Address + ":0"} {
		l, err := net.Listen("tcp", addr)
		if name == "six-" && err != nil {
			t.Logf("this host has no ::1: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close(); c.Close() })
		go answerTCP(l)
		go answerUDP(c, arrived)
		targets = append(targets, fmt.Sprintf("%stcp tcp %d", name, l.Addr().(*net.TCPAddr).Port),
			fmt.Sprintf("%sudp udp %d", name, c.LocalAddr().(*net.UDPAddr).Port))
	}
	return targets, arrived
}

// hostsWord is what the hostile program listens for.
const hostsWord = "of the host's"

func answerTCP(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(conn, hostsWord)
		conn.Close()
	}
}

func answerUDP(c net.PacketConn, arrived *smuggled) {
	buf := make([]byte, 100)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if said := string(buf[:n]); said != "?" {
			arrived.add(said)
		}
		_, _ = c.WriteTo([]byte(hostsWord), from) // it asks again
	}
}

func expectReached(t *testing.T, who, out string, want []string) {
	t.Helper()
	var got []string
	tried := 0
	for line := range strings.Lines(out) {
		f := strings.Split(line, "\t")
		if len(f) == 3 {
			tried++
			if f[1] == "through" {
				got = append(got, f[0])
			}
		}
	}
	slices.Sort(got)
	want = slices.Sorted(slices.Values(want))
	if !slices.Equal(got, want) || tried < 100 {
		t.Errorf("of %d, %s has reached\n%q, want\n%q\n%s", tried, who, got, want, out)
	}
}
