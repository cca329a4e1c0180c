// Package cmd holds the two programs: coracle (the user's command, the node's namespaces and the daemon, by role)
// and coracle-keeper (the lean parent of every container). A main chooses a role and wires; nothing else.
//
// It owns no state. The test here proves how the folders may import each other:
//
//	cmd → pod → {ctr, netslirp, images, cgroupv2},  cmd → rootless
//
// No arrow points upward, and the leaves exchange paths, descriptors and small values, never each other's types.
package cmd
