// Package faults breaks things under a node and looks at what is left: its daemon, at every step of every operation and at
// random moments. The tests speak to the CRI as a kubelet does, and compare what it says with what the kernel and the
// disk have (census).
//
// `make faults` runs them at length; with -short they are part of `make test`.
package faults
