// Command coracle is a rootless CRI runtime for development: its command line, the two RootlessKit processes and
// the daemon, in one program.
//
// A process of it plays one role: the command line (up, down, status, enter, doctor, version, image), the node's
// parent (up, after its checks), the child (PID 1 of the node, the same arguments again), RootlessKit's unshare
// helper (by argv[0]) and the daemon (started by coracle-keeper). main chooses the role and wires; what each role
// does lives in the folders below.
package main
