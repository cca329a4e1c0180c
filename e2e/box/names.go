package box

import (
	"fmt"
	"net"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer is a loopback address, as systemd-resolved's is: what reaches it must come from the host itself.
const nameServer = "127.0.0.53"

// serveNames answers DNS questions over UDP as long as the box lives. Names that it does not have do not exist.
func serveNames(h Host) error {
	conn, err := net.ListenPacket("udp4", nameServer+":53")
	if err != nil {
		return fmt.Errorf("serve names: %w", err)
	}
	go func() { // ends with PID 1
		buf := make([]byte, 1500)
		for {
			n, peer, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if reply, err := answer(h, buf[:n]); err == nil {
				_, _ = conn.WriteTo(reply, peer)
			}
		}
	}()
	return nil
}

func answer(h Host, question []byte) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(question)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	header.Response, header.Authoritative, header.RecursionAvailable = true, true, header.RecursionDesired
	ip, known := h.Names[strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))]
	if !known {
		header.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, header)
	b.EnableCompression()
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if known && q.Type == dnsmessage.TypeA {
		if err := b.StartAnswers(); err != nil {
			return nil, err
		}
		var a dnsmessage.AResource
		copy(a.A[:], net.ParseIP(ip).To4())
		if err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, a); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}
