// Package e2e tests coracle from outside, as its users meet it: the built programs, crictl built from its module,
// a registry on loopback, and the kernel's own lists of processes, mounts, cgroups, interfaces and sockets.
//
// Nouns: home (the directories of one test's user), node (a coracle that runs in a home), crictl (the client, of
// one node), snapshot (what of a node the kernel and the disk show). The tests own all state; a home is removed by
// its test's clean-up, which fails the test where the node has left anything behind.
//
// TestCritest runs the validation suite for CRI runtimes against such a node; `make critest` builds what it needs.
//
// The tests import nothing of the product. They run when CORACLE_E2E names the directory of the built programs, as
// `make e2e` does, and then whatever is missing is a failure; without it they are skipped.
package e2e
