// Package keeper is the one parent of all containers of a node. It starts them through libcontainer, or through an OCI
// runtime program where a request names one, copies their output into CRI logs, waits for their ends and records
// them, runs processes inside them, and starts the daemon again whenever that ends. The daemon asks for all of this
// over package wire and may die at any time: what runs goes on.
//
// Nouns:
//
//   - Keeper: the socket, the table of containers, the calls in flight.
//   - container: one container's facts, and the handles that only its parent has.
//   - engine: what makes the processes of a container: libcontainer in the keeper, or a runtime program.
//   - output: one stream of a container on its way to the log and to whoever is attached.
//   - session: a process that was executed inside a container, and the caller who waits for it.
//   - children: which child processes are the keeper's own; every other child is an orphan to reap.
//
// State. A container's state is computed from three stamps and a live pidfd; nothing else is stored:
//
//	create          start              the init process ends
//	------> created ------> running ----------------------> exited ---> (delete: the record goes)
//	           '--------------------------------------------^
//
// A transition is written to RUNTIMEDIR/keeper/ID.json and flushed first and is told second, so that no reader
// learns an exit code that a crash can take back. The keeper is the only writer of that directory. When the keeper
// dies the node's pid namespace ends with it, and `coracle up` sweeps the runtime directory, records included. A keeper
// that is started over a directory which nobody swept lists what had not ended as exited, with an Error that says so.
//
// Locks, in the order in which they are taken: container.op (one operation: start, update and delete exclude each
// other and the start of an exec), children.launching, container.record, Keeper.mu, container.mu, sandboxed.mu,
// children.mu, journal.mu, output.mu, logFile.mu, sink.mu, filterStore.mu. Only container.op and children.launching are held while
// other processes work.
//
// Waiting is done by pidfds in Go's network poller: no thread per container, and never wait4(-1), which would take
// statuses that libcontainer and os/exec are waiting for. What a runtime program leaves behind becomes the keeper's
// child, as the keeper is a subreaper, and is waited for in the same way.
package keeper
