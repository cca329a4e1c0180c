// Package pod is the CRI RuntimeService: pod sandboxes and their containers, from the gRPC call to what its
// leaves (ctr, netslirp, images, cgroupv2) are asked to do.
//
// Nouns:
//
//   - Service: the CRI face. It owns the index of pods and containers and every goroutine of the package.
//   - pod: one sandbox: an immutable spec, a status that is a snapshot, and the lock of its operations.
//   - container: one container of a pod, likewise.
//   - store: the records on disk; specs in the data directory, statuses in the runtime directory.
//   - streamRuntime: what exec, attach and port-forward do; pod/streaming serves them over HTTP.
//
// State is computed from facts: stamps of what happened, and what the keeper tells about processes. A status
// changes in one place (record), which writes it to disk before readers see it, or, where it is a fact, even though
// the disk refuses it. Reads never wait for an operation.
//
// Locks, in the order in which they may be taken: pod.op (one operation at a time on a pod and its containers,
// held while leaves work), record.mu (one transition), eventLog.mu (events, built from what is published: it is never
// asked for with record.mu or index.mu held), index.mu (maps). usage and memory estimates have locks of their own, under
// which nothing else is taken. StopContainer does not hold pod.op
// during the grace period, since the kubelet stops the containers of a pod side by side.
package pod
