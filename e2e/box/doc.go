// Package box is a host in a box: namespaces (user, mount, pid, network, UTS, IPC) in which a test is an ordinary
// user of a machine that it may shape without root: its own resolv.conf with a name server on port 53 that answers,
// an address beside loopback, subordinate ids or none, /dev/net/tun or none, user namespaces or none.
//
// The test binary executes itself: outside → entry (waits for its id maps) → host (PID 1 of the box, uid 0 there:
// shapes the machine, serves names, reaps) → the test, as the same uid as outside and without any capability. Ids in
// the box have the numbers that they have outside, but for 0, which is the first subordinate id; the user's
// subordinate ids in the box are the rest of them, so that newuidmap works in it as on any machine.
//
// Nouns: Host (how the machine is to be), stage. State is the kernel's, and gone with PID 1.
package box
