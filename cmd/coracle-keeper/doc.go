// Command coracle-keeper runs inside a node's namespaces, as the child of rootlesskit's PID 1: it keeps the
// containers of all pods and starts the daemon, again and again.
//
//	coracle-keeper --runtime-dir DIR [--cgroup-mount] -- /path/coracle daemon ...
//
// It links libcontainer and nothing heavy. libcontainer executes this same program as every container's init and
// as every exec, and pays for the initialisation of each package that is linked; a test lists them.
package main
