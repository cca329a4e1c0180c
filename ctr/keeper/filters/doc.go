// Package filters keeps compiled seccomp filters. libcontainer compiles a container's profile in the init of every
// container and of every exec: libseccomp takes 9 ms for RuntimeDefault (367 rules, three architectures) each time.
//
// What libseccomp makes depends on nothing but the calls that are made to it, so those are written down and compared.
// The linker puts this package between libcontainer and libseccomp (ld(1), --wrap), and the calls pass through it:
//
//   - In a process that has been given a kept filter (Use), the rules are only noted. When libcontainer asks for the
//     program, and all calls until then were, byte for byte, those by which the kept one was made, it gets that. Else the
//     noted calls are made, and libseccomp compiles as ever.
//   - In a process that makes one to be kept (Record), the calls and the program are written to a file, and it ends.
//   - In every other process the calls pass as they are.
//
// Why this is sound: which filter, when, with which flags and under which privileges it is loaded, the stub for unknown
// system calls before it, and every check of it remain libcontainer's. Nothing here decides what is allowed; a difference
// of one rule, of its order or of an attribute is a program compiled anew. A link without the wrappers would be slow, and
// right. The file is a sealed memfd that the keeper alone made: nobody can change it, not even who gets hold of it.
package filters
