// Package cgroupv2 finds a cgroup v2 subtree that an ordinary user may write, takes a part of it for a node, and
// makes, measures, kills and removes the cgroups of pods in it.
//
// The nouns:
//
//   - Delegation: what was found outside, before any namespace: a directory, the controllers that can be enabled
//     below it, one sentence that says so and one hint that tells how to get the rest.
//   - NodeGroup: the cgroup coracle-<node> inside the delegation; the process that entered it, and all that it
//     starts, live below. It becomes the root of the node's cgroup namespace.
//   - Tree: the same cgroup seen from inside the namespaces, mounted on /sys/fs/cgroup.
//   - Stats: what the kernel counted for one cgroup. A nil field was counted by nobody.
//
// The layout of a node's tree. Processes live in leaves only, because the kernel enables controllers for the
// children of a cgroup only where that cgroup has no process itself (cgroups(7), "no internal processes"):
//
//	<delegation>/coracle-<node>             the namespace's root: no process
//	<delegation>/coracle-<node>/supervisor  the node's own processes
//	<delegation>/coracle-<node>/pods/pod<id>/<container>
//	<delegation>/coracle-<node>/<the kubelet's cgroup_parent>/pod<id>/<container>
//
// The state is the kernel's: nothing is kept here but paths and the controllers in force, so every call sees the
// truth and works after a crash. A Tree is immutable and may be used by many goroutines at once; a NodeGroup has
// one lock, which makes a second Leave wait for the first. Nothing here starts a goroutine, and every wait has a
// deadline.
package cgroupv2
