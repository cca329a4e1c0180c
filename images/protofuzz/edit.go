// Package protofuzz turns the bytes that a fuzzer makes up into edits of a request, so that what reaches a server is
// always a message that gRPC would decode, and mostly one that is nearly right: bytes of the wire format that are
// changed at random hardly ever are.
//
// It is imported by tests only, and owns no state.
package protofuzz

import (
	"math"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxEdits bounds the edits of one script, and with them the size of the message.
const maxEdits = 200

// Edit changes m as script says, until the script is at its end. Every script is a valid one.
func Edit(m protoreflect.Message, script []byte) {
	s := &reader{script}
	for n := 0; len(s.left) > 0 && n < maxEdits; n++ {
		s.message(m, 0)
	}
}

// reader takes bytes off a script; at its end come zeros.
type reader struct{ left []byte }

func (s *reader) byte() byte {
	if len(s.left) == 0 {
		return 0
	}
	b := s.left[0]
	s.left = s.left[1:]
	return b
}

func (s *reader) pick(n int) int { return int(s.byte()) % n }

// maxDepth is deeper than any message of the CRI.
const maxDepth = 8

// message edits one field of m, or one below it.
func (s *reader) message(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	if fields.Len() == 0 || depth > maxDepth {
		return
	}
	field := fields.Get(s.pick(fields.Len()))
	switch {
	case field.IsMap():
		value := m.NewField(field).Map().NewValue()
		if field.MapValue().Message() != nil {
			s.message(value.Message(), depth+1)
		} else {
			value = s.scalar(field.MapValue())
		}
		m.Mutable(field).Map().Set(s.scalar(field.MapKey()).MapKey(), value)
	case field.IsList():
		s.list(m.Mutable(field).List(), field, depth)
	case s.byte() >= 0xf0:
		m.Clear(field)
	case field.Message() != nil:
		s.message(m.Mutable(field).Message(), depth+1)
	default:
		m.Set(field, s.scalar(field))
	}
}

func (s *reader) list(list protoreflect.List, field protoreflect.FieldDescriptor, depth int) {
	at := s.pick(list.Len() + 2)
	switch {
	case at == list.Len()+1:
		list.Truncate(0)
	case field.Message() != nil:
		if at == list.Len() {
			list.Append(list.NewElement())
		}
		s.message(list.Get(at).Message(), depth+1)
	case at == list.Len():
		list.Append(s.scalar(field))
	default:
		list.Set(at, s.scalar(field))
	}
}

// numbers are those at which programs go wrong.
var numbers = []int64{0, 1, -1, 2, 9, 64, 1000, 65535, 65536, 100000, 262144, math.MaxInt32, math.MinInt32, math.MaxUint32,
	1 << 40, math.MaxInt64, math.MinInt64, -1000, 1024, 255}

// words are those that mean something to the servers of the CRI, or to what lies below them.
var words = []string{"", "/", ".", "..", "../../etc", "/proc/self/exe", "/dev", "/dev/null", "/etc/passwd", "/tmp", "/nowhere", "a/b", "a\x00b", "a\nb",
	"ALL", "CAP_SYS_ADMIN", "net.ipv4.ip_forward", "kernel.shmmax", "kernel.pid_max", "net/ipv4/conf/eth0/rp_filter", "10.0.0.0/8", "fd00::/64",
	"10.0.0.1", "::1", "localhost/x", "runtime/default", "unconfined", "memory.max", "max", "0-1", "2MB", "POD", "RUNNING", "CREATED", "IMAGE",
	"root", "0:0", "nobody", "-1", "18446744073709551615", "vendor.test/device=one", "system.slice", "/kubepods/pod1", "0.1.0", "rwm", "rro",
	"docker.io/library/busybox", "127.0.0.1:1/x:y", "x@sha256:0000000000000000000000000000000000000000000000000000000000000000",
	strings.Repeat("long", 300), "\u202e\ufeff"}

func (s *reader) text() string {
	if n := s.pick(2 * len(words)); n < len(words) {
		return words[n]
	}
	n := min(s.pick(32), len(s.left))
	raw := string(s.left[:n])
	s.left = s.left[n:]
	return strings.ToValidUTF8(raw, "?") // proto3 has no other strings
}

func (s *reader) number() int64 {
	if n := s.pick(2 * len(numbers)); n < len(numbers) {
		return numbers[n]
	}
	return int64(s.byte())<<8 | int64(s.byte())
}

func (s *reader) scalar(field protoreflect.FieldDescriptor) protoreflect.Value {
	switch field.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(s.byte()%2 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(s.pick(80) - 2))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(s.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(append([]byte(s.text()), s.byte()))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(s.number()))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(s.number()))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(s.number()))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(s.number()))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(float64(s.number()))
	default:
		return protoreflect.ValueOfInt64(s.number())
	}
}
