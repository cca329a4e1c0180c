package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// smuggled are addresses that the user-mode network would take for the host's loopback, were they brought to it, which no
// routing does; and the host's own, to which it may.
var smuggled = []string{"127.0.0.1", "127.0.0.53", "0.0.0.0", "198.51.100.10"}

// The way out of the node, and that of a pod.
const uplink, podUplink = "tap0", "eth0"

// smuggle sends datagrams until ctx ends: by a socket of the way out alone, which takes no capability, and where the
// user-mode network's device is here, as frames of its own making, which takes CAP_NET_RAW. Each says where it is to go;
// whether it arrives is seen there.
func smuggle(ctx context.Context, name, port string) {
	number, err := strconv.Atoi(port)
	if err != nil {
		fmt.Printf("smuggle to %q: %v\n", port, err)
		return
	}
	device := uplink
	if _, err := net.InterfaceByName(uplink); err != nil {
		device = podUplink
	}
	for ctx.Err() == nil {
		for _, to := range smuggled {
			_ = sendByDevice(device, to, number, name+" "+device+" to "+to) // refused, where the kernel knows better
			if device == podUplink {
				continue // what frames do there is a matter of netslirp's tests
			}
			// Without buffer space is a frame that was dropped.
			if err := sendFrame(to, number, name+" frame to "+to); err != nil && !errors.Is(err, unix.ENOBUFS) {
				fmt.Printf("%s frame to %s: %v\n", name, to, err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func sendByDevice(device, to string, port int, body string) error {
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		failed := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), device) })
		return errors.Join(failed, err)
	}}
	conn, err := dialer.Dial("udp4", net.JoinHostPort(to, strconv.Itoa(port)))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte(body))
	return err
}

func sendFrame(to string, port int, body string) error {
	link, err := net.InterfaceByName(uplink)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Around queues, and what filters there (packet(7)).
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		return err
	}
	return unix.Sendto(fd, datagram(link.HardwareAddr, to, port, body), 0, &unix.SockaddrLinklayer{Ifindex: link.Index})
}

// datagram is a frame from the node to the user-mode network's gateway.
func datagram(from net.HardwareAddr, to string, port int, body string) []byte {
	const source = 40009
	ip := make([]byte, 28+len(body))
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], net.ParseIP(node).To4())
	copy(ip[16:], net.ParseIP(to).To4())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum))
	binary.BigEndian.PutUint16(ip[20:], source)
	binary.BigEndian.PutUint16(ip[22:], uint16(port))
	binary.BigEndian.PutUint16(ip[24:], uint16(8+len(body)))
	copy(ip[28:], body)
	return slices.Concat(net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2}, from, []byte{0x08, 0x00}, ip)
}
