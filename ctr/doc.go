// Package ctr turns what the CRI asks of a container into what runs: both ends of the boundary between the
// daemon, which decides, and the keeper, which is the only parent of containers.
//
// The nouns:
//
//   - Host: facts about the node, gathered once, on which the answer depends. Tests inject them.
//   - Spec: the OCI runtime spec. BuildSpec makes it from the CRI's configuration, the image's and the Host;
//     PauseSpec makes that of a pod's PID 1. They read the node's files through Host.FS only, change nothing,
//     and keep nothing.
//   - Client: one call to the keeper (package ctr/wire has the messages, ctr/keeper the other end).
//   - State: a snapshot of a container, computed by the keeper from facts.
//
// What the kernel refuses to a user namespace is found here, before anything runs. A request that cannot be
// honoured is an error that says so; only limits (cgroup controllers that are not delegated, device permissions,
// supplementary groups, environment values that are no text) follow the node's policy: "best-effort" returns a sentence
// for each, "strict" refuses.
// Isolation is never weakened in silence.
//
// State is owned by the keeper. Nothing here holds a lock.
package ctr
