package netslirp

import (
	"encoding/binary"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// frame6 is an IPv6 packet in a frame. Its hop limit is the one that neighbour discovery asks for.
func frame6(to, from net.HardwareAddr, source, destination string, next byte, payload []byte) []byte {
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	copy(ip[8:], net.ParseIP(source).To16())
	copy(ip[24:], net.ParseIP(destination).To16())
	return slices.Concat[[]byte](to, from, []byte{0x86, 0xdd}, ip, payload)
}

// checksum6 is that of RFC 8200, 8.1.
func checksum6(source, destination string, next byte, payload []byte) uint16 {
	all := slices.Concat[[]byte](net.ParseIP(source).To16(), net.ParseIP(destination).To16(), []byte{0, 0, 0, 0, 0, 0, 0, next}, payload)
	binary.BigEndian.PutUint32(all[32:], uint32(len(payload)))
	if len(all)%2 == 1 {
		all = append(all, 0)
	}
	sum := uint32(0)
	for i := 0; i < len(all); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(all[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func udp6(source, destination string, port uint16, body string) []byte {
	p := make([]byte, 8+len(body))
	binary.BigEndian.PutUint16(p, port)
	binary.BigEndian.PutUint16(p[2:], port)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)))
	copy(p[8:], body)
	binary.BigEndian.PutUint16(p[6:], checksum6(source, destination, unix.IPPROTO_UDP, p))
	return p
}

// dhcp6 is a server's answer, by its ports: from 547 to 546 (RFC 8415).
func dhcp6(to, from net.HardwareAddr, source, destination string) []byte {
	p := udp6(source, destination, 546, "\x07\x00\x00\x01"+forgedMark)
	binary.BigEndian.PutUint16(p, 547)
	binary.BigEndian.PutUint16(p[6:], 0)
	binary.BigEndian.PutUint16(p[6:], checksum6(source, destination, unix.IPPROTO_UDP, p))
	return frame6(to, from, source, destination, unix.IPPROTO_UDP, p)
}

// icmp6 fills in the checksum.
func icmp6(source, destination string, message []byte) []byte {
	m := slices.Clone(message)
	binary.BigEndian.PutUint16(m[2:], checksum6(source, destination, unix.IPPROTO_ICMPV6, m))
	return m
}

// marked is an option of neighbour discovery that nobody knows and everybody skips.
func marked() []byte { return append([]byte{253, 2}, forgedMark...) }

func ofLink(kind byte, mac net.HardwareAddr) []byte { return append([]byte{kind, 1}, mac...) }

// asks is a neighbour solicitation.
func asks(target string, mac net.HardwareAddr) []byte {
	return slices.Concat([]byte{neighbourAsks, 0, 0, 0, 0, 0, 0, 0}, net.ParseIP(target).To16(), ofLink(1, mac), marked())
}

// tells is a neighbour advertisement that overrides what was known.
func tells(target string, mac net.HardwareAddr) []byte {
	const solicitedOverride = 0x60
	return slices.Concat([]byte{neighbourTells, 0, 0, 0, solicitedOverride, 0, 0, 0}, net.ParseIP(target).To16(), ofLink(2, mac), marked())
}

// evilPrefix is what a false router advertises.
const evilPrefix = "2001:db8:bad::"

// advertises is a router's advertisement: a default route, and a prefix to make addresses of.
func advertises() []byte {
	prefix := []byte{3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0}
	return slices.Concat([]byte{routerTells, 0, 0, 0, 64, 0, 0x0e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0}, prefix, net.ParseIP(evilPrefix).To16(), marked())
}

// redirects tells of a better first hop.
func redirects(destination, hop string) []byte {
	return slices.Concat([]byte{routerRedirects, 0, 0, 0, 0, 0, 0, 0}, net.ParseIP(hop).To16(), net.ParseIP(destination).To16(), marked())
}

// listens is a report of RFC 3810, with the mark in its auxiliary data.
func listens(group string) []byte {
	return slices.Concat([]byte{143, 0, 0, 0, 0, 0, 0, 1, 4, 4, 0, 0}, net.ParseIP(group).To16(), []byte(forgedMark+"  "))
}

// hidden puts the message behind two extension headers, hop-by-hop and destination options of padding.
func hidden(to, from net.HardwareAddr, source, destination string, message []byte) []byte {
	const hopByHop, destinationOptions = 0, 60
	padding := []byte{0, 1, 4, 0, 0, 0, 0}
	headers := slices.Concat([]byte{destinationOptions}, padding, []byte{unix.IPPROTO_ICMPV6}, padding)
	return frame6(to, from, source, destination, hopByHop, append(headers, icmp6(source, destination, message)...))
}

// fragment puts the message into a fragment that is the whole.
func fragment(to, from net.HardwareAddr, source, destination string, message []byte) []byte {
	header := []byte{unix.IPPROTO_ICMPV6, 0, 0, 0, 0, 0, 0, 1}
	return frame6(to, from, source, destination, unix.IPPROTO_FRAGMENT, append(header, icmp6(source, destination, message)...))
}

// retyped gives the frame another EtherType.
func retyped(frame []byte, kind ...byte) []byte { return slices.Concat(frame[:12], kind, frame[14:]) }
