package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// handoverFormat is the version of what a keeper leaves to the next, a number. It goes up with every change that a keeper
// of before would misread. The linker may set it, so that a test has a keeper that knows another one.
var handoverFormat = "1"

func handoverVersion() int {
	n, err := strconv.Atoi(handoverFormat)
	if err != nil {
		panic("keeper: version of the handover: " + err.Error()) // a defect of the build
	}
	return n
}

// CheckHandoverFlag makes the keeper's program only tell whether it could take over what comes on its standard input.
const CheckHandoverFlag = "check-handover"

// handoverEnv names the descriptor of the state.
const handoverEnv = "_CORACLE_KEEPER_HANDOVER"

// Handover is what one keeper leaves to the next in its process. Descriptors are numbers; where there is none, -1.
type Handover struct {
	Version int `json:"version"`
	// Refused is why a keeper that got this went back to the one of before; "" on the way to it.
	Refused string `json:"refused,omitempty"`

	From     string `json:"from"` // the version of the program that leaves this
	Program  int    `json:"program"`
	Path     string `json:"path"`
	Listener int    `json:"listener"`
	Caller   int    `json:"caller"` // the connection on which the replacement was asked for

	BootID     string             `json:"bootID"`
	Seq        uint64             `json:"seq"`
	ExecCount  uint64             `json:"execCount"`
	RunCount   uint64             `json:"runCount"`
	Daemon     handedDaemon       `json:"daemon"`
	Containers []*handedContainer `json:"containers,omitempty"`
	Execs      []*handedExec      `json:"execs,omitempty"`

	held    *os.File // Program
	raw     []byte   // as it was received
	adopted adopted
}

// handedProcess names a child that nobody has reaped.
type handedProcess struct {
	Pid     int    `json:"pid"`
	Start   uint64 `json:"start"`
	Session int    `json:"session"`
}

type handedDaemon struct {
	Path    string         `json:"path,omitempty"`
	File    int            `json:"file"`
	Running *handedProcess `json:"running,omitempty"`
}

type handedContainer struct {
	State   wire.State     `json:"state"`
	Seq     uint64         `json:"seq"`
	Init    *handedProcess `json:"init,omitempty"` // nil once it is reaped
	Doomed  bool           `json:"doomed,omitempty"`
	Behind  bool           `json:"behind,omitempty"` // its record waits for room
	Engine  *handedEngine  `json:"engine,omitempty"`
	Stdio   *handedStdio   `json:"stdio,omitempty"`
	OwnPID  bool           `json:"ownPID,omitempty"`
	MountNS string         `json:"mountNS,omitempty"`
	Mounts  int            `json:"mounts"`
	Cgroup  string         `json:"cgroup,omitempty"`
}

// handedEngine is libcontainer, which keeps its state in a directory, where Runtime is nil.
type handedEngine struct {
	Runtime *wire.Runtime `json:"runtime,omitempty"`
	Cgroup  string        `json:"cgroup,omitempty"`
	Born    bool          `json:"born,omitempty"` // its processes are made by birth
}

type handedStdio struct {
	TTY    int           `json:"tty"`
	Stdin  int           `json:"stdin"` // the same as TTY where that is what is written to
	Once   bool          `json:"once,omitempty"`
	Stdout *handedOutput `json:"stdout"`
	Stderr *handedOutput `json:"stderr,omitempty"`
	Log    *handedLog    `json:"log,omitempty"`
}

type handedOutput struct {
	Source  int    `json:"source"` // -1 once the stream has ended
	Pending []byte `json:"pending,omitempty"`
}

type handedLog struct {
	Path    string `json:"path"`
	File    int    `json:"file"`
	Dropped int64  `json:"dropped,omitempty"`
	Torn    bool   `json:"torn,omitempty"`
}

type handedExec struct {
	Container string        `json:"container"`
	Leader    handedProcess `json:"leader"`
	Caller    int           `json:"caller"`
	Cgroup    string        `json:"cgroup,omitempty"`
	Inside    int           `json:"inside,omitempty"` // the pid in its sandbox
	Exited    bool          `json:"exited,omitempty"`
	Code      int           `json:"code,omitempty"`
}

// encode writes h down. What was received goes back as it came, also what this program does not know of it.
func (h *Handover) encode() ([]byte, error) {
	var state any = h
	if h.raw != nil {
		parts := map[string]any{}
		decoder := json.NewDecoder(bytes.NewReader(h.raw))
		decoder.UseNumber()
		if err := decoder.Decode(&parts); err != nil {
			return nil, fmt.Errorf("encode state: %w", err)
		}
		parts["refused"] = h.Refused
		state = parts
	}
	raw, err := json.Marshal(state)
	if err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	return raw, nil
}

// descriptors are those that the next program is to have.
func (h *Handover) descriptors() []int {
	all := []int{h.Program, h.Listener, h.Caller, h.Daemon.File}
	for _, c := range h.Containers {
		all = append(all, c.Mounts)
		if c.Stdio == nil {
			continue
		}
		all = append(all, c.Stdio.TTY, c.Stdio.Stdin)
		for _, o := range []*handedOutput{c.Stdio.Stdout, c.Stdio.Stderr} {
			if o != nil {
				all = append(all, o.Source)
			}
		}
		if c.Stdio.Log != nil {
			all = append(all, c.Stdio.Log.File)
		}
	}
	for _, x := range h.Execs {
		all = append(all, x.Caller)
	}
	seen := map[int]bool{}
	var out []int
	for _, fd := range all {
		if fd >= 0 && !seen[fd] {
			seen[fd] = true
			out = append(out, fd)
		}
	}
	return out
}

// CheckHandover tells whether this program can take over the state that r has.
func CheckHandover(r io.Reader) error {
	h, err := decodeHandover(r)
	if err != nil {
		return err
	}
	return h.check()
}

func decodeHandover(r io.Reader) (*Handover, error) {
	var h Handover
	if err := json.NewDecoder(r).Decode(&h); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	return &h, nil
}

func (h *Handover) check() error {
	if h.Version != handoverVersion() {
		return fmt.Errorf("the state is of version %d (keeper %s), and this keeper knows version %d alone", h.Version, h.From, handoverVersion())
	}
	return nil
}

// Received returns what the keeper before has left to this one; nil for a keeper that begins. What this one cannot read it
// gives back: then, as after GoBack, the error is one that ends the node.
func Received() (*Handover, error) {
	value, ok := os.LookupEnv(handoverEnv)
	if !ok {
		return nil, nil
	}
	if err := os.Unsetenv(handoverEnv); err != nil {
		return nil, err
	}
	fd, err := strconv.Atoi(value)
	if err != nil {
		return nil, fmt.Errorf("find state of the keeper before: %w", err)
	}
	raw, err := readState(os.NewFile(uintptr(fd), "handover"))
	if err != nil {
		return nil, fmt.Errorf("read state of the keeper before: %w", err)
	}
	h, err := decodeHandover(bytes.NewReader(raw))
	if err != nil {
		back, wayErr := wayBack(raw)
		if wayErr != nil {
			return nil, errors.Join(err, wayErr)
		}
		return nil, back.GoBack(err)
	}
	h.raw = raw
	return h, h.inherit(false) // of a descriptor that is closed there is no way back either
}

func readState(f *os.File) (_ []byte, err error) {
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// wayBack is as much of a state that cannot be read as it takes to give it back. Of the descriptors in it nothing is
// known, and as they came they pass through the next execve(2) as well.
func wayBack(raw []byte) (*Handover, error) {
	var way struct {
		Refused string `json:"refused"`
		From    string `json:"from"`
		Program int    `json:"program"`
		Path    string `json:"path"`
	}
	if err := json.Unmarshal(raw, &way); err != nil {
		return nil, fmt.Errorf("find the way back: %w", err)
	}
	if way.Path == "" {
		return nil, errors.New("find the way back: there is none in it")
	}
	return &Handover{Refused: way.Refused, From: way.From, Program: way.Program, Path: way.Path, Listener: -1, Caller: -1,
		Daemon: handedDaemon{File: -1}, raw: raw}, nil
}

// GoBack executes the program that left h, for which the reason is given. It returns only on an error, and then the node
// ends.
func (h *Handover) GoBack(reason error) error {
	if h.Refused != "" {
		return fmt.Errorf("neither the new keeper (%s) nor the one of before can go on: %w", h.Refused, reason)
	}
	h.Refused = fmt.Sprintf("the new keeper could not take over: %v; the keeper of before goes on", reason)
	return errors.Join(reason, h.execute(os.NewFile(uintptr(h.Program), "keeper"), h.Path))
}
