package ctr

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// pause is this program, assembled by hand, because it is 80 bytes and a compiler for each architecture is not:
//
//	rt_sigprocmask(SIG_BLOCK, {SIGTERM, SIGINT}, NULL, 8);
//	rt_sigaction(SIGCHLD, {SIG_IGN, SA_NOCLDWAIT}, NULL, 8);
//	while (rt_sigtimedwait({SIGTERM, SIGINT}, NULL, NULL, 8) < 0)
//		;
//	exit_group(0);
//
// The kernel drops a signal without a handler that is sent to a PID 1, but not a blocked one, which waits until it
// is asked for; so no handler is needed. With SIGCHLD ignored the kernel reaps what the pod's containers orphan, and
// also what was a zombie already when it came to PID 1 (sigaction(2), reparent_leader in kernel/exit.c).
//
// Both architectures have their data at the same offsets from the first instruction.
const (
	pauseMask = 80 // sigset_t, 8 bytes
	pauseAct  = 88 // struct sigaction of the kernel, 32 bytes
	pauseSize = 120
)

var pauseCodeAMD64 = []byte{
	0xb8, 14, 0, 0, 0, //                  0  mov   eax, 14            rt_sigprocmask
	0x31, 0xff, //                         5  xor   edi, edi           SIG_BLOCK
	0x48, 0x8d, 0x35, 66, 0, 0, 0, //      7  lea   rsi, [rip+66]      mask
	0x31, 0xd2, //                        14  xor   edx, edx
	0x41, 0xba, 8, 0, 0, 0, //            16  mov   r10d, 8            sizeof mask; stays in r10
	0x0f, 0x05, //                        22  syscall
	0xb8, 13, 0, 0, 0, //                 24  mov   eax, 13            rt_sigaction
	0xbf, 17, 0, 0, 0, //                 29  mov   edi, 17            SIGCHLD
	0x48, 0x8d, 0x35, 47, 0, 0, 0, //     34  lea   rsi, [rip+47]      act
	0x31, 0xd2, //                        41  xor   edx, edx
	0x0f, 0x05, //                        43  syscall
	0xb8, 128, 0, 0, 0, //                45  mov   eax, 128           rt_sigtimedwait
	0x48, 0x8d, 0x3d, 23, 0, 0, 0, //     50  lea   rdi, [rip+23]      mask
	0x31, 0xf6, //                        57  xor   esi, esi
	0x31, 0xd2, //                        59  xor   edx, edx           no timeout
	0x0f, 0x05, //                        61  syscall
	0x85, 0xc0, //                        63  test  eax, eax
	0x78, 0xea, //                        65  js    45                 EINTR
	0xb8, 231, 0, 0, 0, //                67  mov   eax, 231           exit_group
	0x31, 0xff, //                        72  xor   edi, edi
	0x0f, 0x05, //                        74  syscall
	0xcc, 0xcc, 0xcc, 0xcc, //            76  int3
}

var pauseCodeARM64 = words(
	0xd28010e8, //  0  movz x8, #135      rt_sigprocmask
	0xd2800000, //  4  movz x0, #0        SIG_BLOCK
	0x10000241, //  8  adr  x1, 80        mask
	0xd2800002, // 12  movz x2, #0
	0xd2800103, // 16  movz x3, #8        sizeof mask; stays in x3
	0xd4000001, // 20  svc  #0
	0xd28010c8, // 24  movz x8, #134      rt_sigaction
	0xd2800220, // 28  movz x0, #17       SIGCHLD
	0x100001c1, // 32  adr  x1, 88        act
	0xd2800002, // 36  movz x2, #0
	0xd4000001, // 40  svc  #0
	0xd2801128, // 44  movz x8, #137      rt_sigtimedwait
	0x10000100, // 48  adr  x0, 80        mask
	0xd2800001, // 52  movz x1, #0
	0xd2800002, // 56  movz x2, #0        no timeout
	0xd4000001, // 60  svc  #0
	0xb7ffff60, // 64  tbnz x0, #63, 44   EINTR
	0xd2800bc8, // 68  movz x8, #94       exit_group
	0xd2800000, // 72  movz x0, #0
	0xd4000001, // 76  svc  #0
)

func words(in ...uint32) []byte {
	var out []byte
	for _, w := range in {
		out = binary.LittleEndian.AppendUint32(out, w)
	}
	return out
}

// pauseData is the mask with SIGINT (2) and SIGTERM (15), and {SIG_IGN, SA_NOCLDWAIT, no restorer, empty mask}.
func pauseData() []byte {
	var out []byte
	for _, w := range []uint64{1<<(2-1) | 1<<(15-1), 1, 2, 0, 0} {
		out = binary.LittleEndian.AppendUint64(out, w)
	}
	return out
}

// pauseELF returns the static executable of pause for a GOARCH.
func pauseELF(arch string) ([]byte, error) {
	var machine elf.Machine
	var code []byte
	switch arch {
	case "amd64":
		machine, code = elf.EM_X86_64, pauseCodeAMD64
	case "arm64":
		machine, code = elf.EM_AARCH64, pauseCodeARM64
	default:
		return nil, unsupported("pause for the architecture %s", arch)
	}
	const base, headers = 0x400000, 64 + 2*56 // ELF header, two program headers
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Entry: base + headers,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2, Shentsize: 64,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	size := uint64(headers + pauseSize)
	segments := []elf.Prog64{
		// The whole file, not writable. 64 KiB are the largest pages of both architectures.
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x10000},
		{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16}, // no executable stack
	}
	var out bytes.Buffer
	for _, part := range []any{h, segments, code, pauseData()} {
		if err := binary.Write(&out, binary.LittleEndian, part); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}
