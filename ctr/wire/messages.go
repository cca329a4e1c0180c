package wire

import (
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Op names a call.
type Op string

// The calls, all of them.
const (
	OpInfo      Op = "info"
	OpCreate    Op = "create"
	OpStart     Op = "start"
	OpKill      Op = "kill"
	OpDelete    Op = "delete"
	OpExec      Op = "exec"
	OpAttach    Op = "attach"
	OpResize    Op = "resize"
	OpReopenLog Op = "reopenlog"
	OpUpdate    Op = "update"
	OpList      Op = "list"
	OpEvents    Op = "events"
	OpRestart   Op = "restart"
	OpReplace   Op = "replace"
	OpShutdown  Op = "shutdown"
)

// Request is one call. ID names the container where the call has one; of the other fields the one that belongs to
// the call is set.
type Request struct {
	Op        Op                    `json:"op"`
	ID        string                `json:"id,omitempty"`
	Create    *Create               `json:"create,omitempty"`
	Kill      *Kill                 `json:"kill,omitempty"`
	Exec      *Exec                 `json:"exec,omitempty"`
	Streams   Streams               `json:"streams,omitzero"`
	Size      *Size                 `json:"size,omitempty"`
	Since     uint64                `json:"since,omitempty"`
	Resources *specs.LinuxResources `json:"resources,omitempty"`
	// LogDir is as in Create, of a log that is opened again (reopenlog): the keeper does not remember it.
	LogDir string `json:"logDir,omitempty"`
	// Program is the absolute path of what is to run from now on: as the daemon (restart), as the keeper (replace).
	Program string `json:"program,omitempty"`
}

// Create describes the container to make.
type Create struct {
	Spec *specs.Spec `json:"spec"`
	// LogPath is absolute, and below LogDir where that is given; "" keeps no log.
	LogPath string `json:"logPath,omitempty"`
	// LogDir is absolute. Links on the way to it are followed, and none from there on. From a daemon that gives none, only
	// the last part of LogPath must not be one.
	LogDir string `json:"logDir,omitempty"`
	// Stdin keeps the container's standard input open for attach; without it the container reads /dev/null.
	Stdin bool `json:"stdin,omitempty"`
	// StdinOnce closes it when the first attach that had it ends.
	StdinOnce bool `json:"stdinOnce,omitempty"`
	// TTY gives the container a terminal, whose other end the keeper holds.
	TTY bool `json:"tty,omitempty"`
	// Runtime is the OCI runtime program that makes the container; nil is libcontainer in the keeper.
	Runtime *Runtime `json:"runtime,omitempty"`
}

// Runtime names an OCI runtime program. The keeper runs it as Path Args... COMMAND, once for each step.
type Runtime struct {
	// Path is absolute.
	Path string   `json:"path"`
	Args []string `json:"args,omitempty"`
	// Sandbox is the id of the container whose processes hold this one, where the program gives it none of its own
	// (gVisor's sandboxes); "" where it does.
	Sandbox string `json:"sandbox,omitempty"`
}

// Kill asks for a signal, to the init process or to every process of the container.
type Kill struct {
	Signal syscall.Signal `json:"signal"`
	All    bool           `json:"all,omitempty"`
}

// Exec describes a process to run in a container.
type Exec struct {
	Process *specs.Process `json:"process"`
	TTY     bool           `json:"tty,omitempty"`
}

// Streams says which standard streams the descriptors of a frame are: one descriptor for each true field, in this
// order.
type Streams struct {
	Stdin  bool `json:"stdin,omitempty"`
	Stdout bool `json:"stdout,omitempty"`
	Stderr bool `json:"stderr,omitempty"`
}

// Size is a terminal's, in characters.
type Size struct {
	Width  uint16 `json:"width"`
	Height uint16 `json:"height"`
}

// Reply is an answer of the keeper. Where Error is set nothing else is.
type Reply struct {
	Error    *Error  `json:"error,omitempty"`
	State    *State  `json:"state,omitempty"`
	States   []State `json:"states,omitempty"`
	Info     *Info   `json:"info,omitempty"`
	Event    *Event  `json:"event,omitempty"`
	ExitCode *int    `json:"exitCode,omitempty"`
}

// State is a snapshot of a container, computed from the keeper's facts.
type State struct {
	ID  string `json:"id"`
	Pid int    `json:"pid"`
	// PidStart is field 22 of /proc/PID/stat: with Pid it names the process for ever.
	PidStart uint64 `json:"pidStart"`
	// A zero time means: not yet.
	CreatedAt  time.Time `json:"createdAt,omitzero"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	// ExitCode is 128+n for a death by signal n.
	ExitCode  int  `json:"exitCode"`
	OOMKilled bool `json:"oomKilled,omitempty"`
	// Error says why a container did not start, or how its end was lost.
	Error string `json:"error,omitempty"`
}

// Running tells whether the container's program has been started and has not ended.
func (s State) Running() bool { return !s.StartedAt.IsZero() && s.FinishedAt.IsZero() }

// Exited tells whether the container's init process has ended, started or not.
func (s State) Exited() bool { return !s.FinishedAt.IsZero() }

// Info describes the keeper.
type Info struct {
	Version string `json:"version"`
	// BootID is new at each start of a keeper: another value is another node, in which nothing of the old one runs.
	BootID string `json:"bootID"`
	Pid    int    `json:"pid"`
	// Seq is the sequence of the last event; Events(Seq) tells all that happens from here on.
	Seq uint64 `json:"seq"`
	// Goroutines is how many the keeper has now: with no container and no call a handful, and always the same.
	Goroutines int `json:"goroutines"`
}

// The types of events. An oom comes just before the exit of the same container.
const (
	EventExit = "exit"
	EventOOM  = "oom"
)

// Event is a change that the caller did not ask for.
type Event struct {
	Seq   uint64 `json:"seq"`
	Type  string `json:"type"`
	State State  `json:"state"`
}
