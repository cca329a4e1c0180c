package netslirp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A pod with CAP_NET_ADMIN takes another's address, and gets no answer with it; the other one keeps its own.
func TestAPodCannotUseAnothersAddress(t *testing.T) {
	l := newLab(t)
	n := l.open()
	thief, victim := l.attach(n, "thief"), l.attach(n, "victim")
	serveUDP(t, l.node, ":53", "node")
	serveTCP(t, victim.ns, ":80", "victim")
	wantAnswer(t, thief.ns, "udp", "10.88.0.1:53", "node "+thief.ip)
	within(t, thief.ns, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC("0a:58:0a:58:00:03") // the victim's
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetHardwareAddr(link, mac), address("eth0", victim.ip+"/32"), address("eth0", victim.ip6+"/128"))
	})
	for _, from := range []string{victim.ip, victim.ip6} {
		to := map[bool]string{true: "10.88.0.1:53", false: join(sixOf("1"), 53)}[from == victim.ip]
		if answer, err := askFrom(thief.ns, from, to); err == nil {
			t.Errorf("the node answered %s: %q", from, answer)
		}
	}
	wantAnswer(t, l.node, "tcp", victim.ip+":80", "victim 10.88.0.1")
	wantAnswer(t, l.node, "tcp", join(victim.ip6, 80), "victim "+sixOf("1"))
}

// What pods with raw sockets send of their own making: nothing of it arrives, at another pod or at the node.
func TestForgedFramesAreDropped(t *testing.T) {
	l := newLab(t)
	n := l.open()
	thief, victim := l.attach(n, "thief"), l.attach(n, "victim")
	all := net.HardwareAddr(bytes.Repeat([]byte{0xff}, 6))
	thiefMAC, victimMAC := hardwareAddr(netip.MustParseAddr(thief.ip)), hardwareAddr(netip.MustParseAddr(victim.ip))
	gateway := hardwareAddr(netip.MustParseAddr("10.88.0.1"))
	const mark = "a forged frame"
	frames := map[string][]byte{
		"to the victim's MAC":                    udpFrame(victimMAC, thiefMAC, thief.ip, victim.ip, mark),
		"to all":                                 udpFrame(all, thiefMAC, thief.ip, "255.255.255.255", mark),
		"to a MAC that nobody has":               udpFrame(net.HardwareAddr{2, 0, 0, 0, 0, 9}, thiefMAC, thief.ip, victim.ip, mark),
		"to a group":                             udpFrame(net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, thiefMAC, thief.ip, "224.0.0.1", mark),
		"from the victim by the gateway":         udpFrame(gateway, thiefMAC, victim.ip, victim.ip, mark),
		"from the victim with its MAC":           udpFrame(gateway, victimMAC, victim.ip, victim.ip, mark),
		"from the gateway":                       udpFrame(gateway, thiefMAC, "10.88.0.1", victim.ip, mark),
		"from a stranger":                        udpFrame(gateway, thiefMAC, "192.0.2.1", victim.ip, mark),
		"of a protocol of its own":               slices.Concat(victimMAC, thiefMAC, []byte{0x88, 0xb5}, []byte(mark)),
		"the gateway's address, told the victim": slices.Concat(arpReply(victimMAC, thiefMAC, "10.88.0.1", victim.ip), []byte(mark)),
		"the gateway's address, told to all":     slices.Concat(arpReply(all, thiefMAC, "10.88.0.1", victim.ip), []byte(mark)),
		"the victim's address, told the node":    slices.Concat(arpReply(gateway, thiefMAC, victim.ip, "10.88.0.1"), []byte(mark)),
	}
	atVictim, atThief := sniff(t, victim.ns, podInterface), sniff(t, thief.ns, podInterface)
	raw := packetSocket(t, thief.ns, podInterface)
	for name, frame := range frames {
		must(t, raw.send(frame))
		// The one that may pass, after it: what came before has been dealt with once this is here.
		must(t, raw.send(udpFrame(gateway, thiefMAC, thief.ip, victim.ip, "the end of "+name)))
		if seen := atVictim.until(t, "the end of "+name); bytes.Contains(seen, []byte(mark)) {
			t.Errorf("a frame %s arrived at the victim", name)
		}
	}
	within(t, l.node, func() error {
		neighbours, err := netlink.NeighList(n.node.bridge.Attrs().Index, unix.AF_INET)
		for _, x := range neighbours {
			if x.IP.String() == victim.ip && !bytes.Equal(x.HardwareAddr, victimMAC) {
				t.Errorf("the node sends what is for the victim to %s", x.HardwareAddr)
			}
		}
		return err
	})
	// With the victim's MAC as a source the bridge has not moved: this goes to the victim alone.
	serveTCP(t, victim.ns, ":80", "victim")
	wantAnswer(t, l.node, "tcp", victim.ip+":80", "victim 10.88.0.1")
	must(t, raw.send(udpFrame(gateway, thiefMAC, thief.ip, thief.ip, "the end")))
	if seen := atThief.until(t, "the end"); bytes.Contains(seen, []byte("victim 10.88.0.1")) {
		t.Error("the thief sees the victim's answers")
	}
}

func askFrom(ns, from, to string) (string, error) {
	var conn net.Conn
	f, err := openNetNS(ns)
	if err != nil {
		return "", err
	}
	defer f.Close()
	err = inNetNS(f, func() (err error) {
		conn, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}).Dial("udp", to)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", err
	}
	if err := conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		return "", err
	}
	buf := make([]byte, 100)
	got, err := conn.Read(buf)
	return string(buf[:got]), err
}

// wireTap is a packet(7) socket on an interface.
type wireTap struct{ *os.File }

func packetSocket(t testing.TB, ns, name string) wireTap {
	t.Helper()
	var tap wireTap
	within(t, ns, func() error {
		link, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		if err != nil {
			return err
		}
		tap = wireTap{os.NewFile(uintptr(fd), name)}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index})
	})
	t.Cleanup(func() { tap.Close() })
	return tap
}

func (w wireTap) send(frame []byte) error {
	_, err := w.Write(frame)
	return err
}

// sniff also takes what is for others (PACKET_MR_PROMISC).
func sniff(t testing.TB, ns, name string) wireTap {
	t.Helper()
	tap := packetSocket(t, ns, name)
	within(t, ns, func() error {
		link, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		return unix.SetsockoptPacketMreq(int(tap.Fd()), unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP,
			&unix.PacketMreq{Ifindex: int32(link.Index), Type: unix.PACKET_MR_PROMISC})
	})
	must(t, unix.SetNonblock(int(tap.Fd()), true))
	return tap
}

// until returns everything that comes in before a frame with the word.
func (w wireTap) until(t testing.TB, word string) []byte {
	t.Helper()
	var seen []byte
	buf := make([]byte, 1<<16)
	deadline := time.Now().Add(5 * time.Second)
	for {
		n, err := unix.Read(int(w.Fd()), buf)
		switch {
		case errors.Is(err, unix.EAGAIN) && time.Now().Before(deadline):
			time.Sleep(time.Millisecond)
		case err != nil:
			t.Fatalf("%q did not come: %v", word, err)
		case bytes.Contains(buf[:n], []byte(word)):
			return seen
		default:
			seen = append(seen, buf[:n]...)
		}
	}
}

func udpFrame(to, from net.HardwareAddr, source, destination, body string) []byte {
	ip := make([]byte, 28+len(body))
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], net.ParseIP(source).To4())
	copy(ip[16:], net.ParseIP(destination).To4())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum))
	binary.BigEndian.PutUint16(ip[20:], 9)
	binary.BigEndian.PutUint16(ip[22:], 9)
	binary.BigEndian.PutUint16(ip[24:], uint16(8+len(body)))
	copy(ip[28:], body)
	return slices.Concat[[]byte](to, from, []byte{0x08, 0x00}, ip)
}

// arpReply says that from has the address.
func arpReply(to, from net.HardwareAddr, address, asker string) []byte {
	return slices.Concat[[]byte](to, from, []byte{0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2}, from, net.ParseIP(address).To4(), to, net.ParseIP(asker).To4())
}
