// Package rootless turns one ordinary user's process into a node: a user namespace in which that user is uid 0,
// with mount, pid, cgroup, IPC and UTS namespaces of its own and a detached network namespace.
//
// The nouns: a Node names the directories and sockets of one node of one user; a Record says, on disk, which
// process is its parent; a Lock proves that nobody else runs it; a Problem is something about the host that
// forbids a node, with the command that mends it.
//
// RootlessKit does the work as a library: Parent runs in the host's namespaces and writes the id maps, Child is
// the same executable again as PID 1 of the new pid namespace. The death of either is the node's death, by
// PR_SET_PDEATHSIG and by pid_namespaces(7).
//
// The parent process owns the Record and the Lock. There are no locks between goroutines here.
package rootless
