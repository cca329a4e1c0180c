package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The messages between libcontainer's two halves, as the parent's half of v1.5.2 has them.

// initConfig is what the init decodes. The names of its fields are libcontainer's.
type initConfig struct {
	Config           *configs.Config       `json:"config"`
	Args             []string              `json:"args"`
	Env              []string              `json:"env"`
	UID              int                   `json:"uid"`
	GID              int                   `json:"gid"`
	AdditionalGroups []int                 `json:"additional_groups"`
	Cwd              string                `json:"cwd"`
	CreateConsole    bool                  `json:"create_console"`
	ConsoleWidth     uint16                `json:"console_width"`
	ConsoleHeight    uint16                `json:"console_height"`
	PassedFilesCount int                   `json:"passed_files_count"`
	AppArmorProfile  string                `json:"apparmor_profile"`
	Capabilities     *configs.Capabilities `json:"capabilities"`
	NoNewPrivileges  bool                  `json:"no_new_privileges"`
	ProcessLabel     string                `json:"process_label"`
	Rlimits          []configs.Rlimit      `json:"rlimits"`
	IOPriority       *configs.IOPriority   `json:"io_priority,omitempty"`
	Scheduler        *configs.Scheduler    `json:"scheduler,omitempty"`
	ContainerID      string                `json:"containerid"`
	Cgroup2Path      string                `json:"cgroup2_path,omitempty"`
}

// newInitConfig takes from a process what it says, and the rest from the container.
func newInitConfig(id string, c *configs.Config, p *libcontainer.Process) *initConfig {
	ic := &initConfig{Config: c, ContainerID: id, Args: p.Args, Env: p.Env, UID: p.UID, GID: p.GID, AdditionalGroups: p.AdditionalGroups,
		Cwd: p.Cwd, CreateConsole: p.ConsoleSocket != nil, ConsoleWidth: p.ConsoleWidth, ConsoleHeight: p.ConsoleHeight,
		PassedFilesCount: len(p.ExtraFiles), AppArmorProfile: c.AppArmorProfile, Capabilities: c.Capabilities,
		NoNewPrivileges: c.NoNewPrivileges, ProcessLabel: c.ProcessLabel, Rlimits: c.Rlimits, IOPriority: c.IOPriority, Scheduler: c.Scheduler}
	if p.Capabilities != nil {
		ic.Capabilities = p.Capabilities
	}
	if p.NoNewPrivileges != nil {
		ic.NoNewPrivileges = *p.NoNewPrivileges
	}
	if p.AppArmorProfile != "" {
		ic.AppArmorProfile = p.AppArmorProfile
	}
	if p.Label != "" {
		ic.ProcessLabel = p.Label
	}
	if len(p.Rlimits) > 0 {
		ic.Rlimits = p.Rlimits
	}
	if p.IOPriority != nil {
		ic.IOPriority = p.IOPriority
	}
	if p.Scheduler != nil {
		ic.Scheduler = p.Scheduler
	}
	return ic
}

// bootstrap is the first message, which the C half of the init reads before there are threads: the namespaces to make
// and to join. joined are paths by type.
func bootstrap(c *configs.Config, flags uintptr, joined map[configs.NamespaceType]string) ([]byte, error) {
	r := nl.NewNetlinkRequest(int(libcontainer.InitMsg), 0)
	r.AddData(&libcontainer.Int32msg{Type: libcontainer.CloneFlagsAttr, Value: uint32(flags)})
	var paths []string
	for _, kind := range configs.NamespaceTypes() { // in the order in which they can be joined
		path := joined[kind]
		if path == "" {
			continue
		}
		if _, err := os.Lstat(path); err != nil {
			return nil, fmt.Errorf("find namespace: %w", err)
		}
		if strings.Contains(path, ",") {
			return nil, fmt.Errorf("path %q of a namespace has a comma", path)
		}
		paths = append(paths, configs.NsName(kind)+":"+path)
	}
	if list := strings.Join(paths, ","); len(list) > 32<<10 {
		return nil, errors.New("paths of namespaces are too long") // a length has 16 bits
	} else if list != "" {
		r.AddData(&libcontainer.Bytemsg{Type: libcontainer.NsPathsAttr, Value: []byte(list)})
	}
	if c.OomScoreAdj != nil {
		r.AddData(&libcontainer.Bytemsg{Type: libcontainer.OomScoreAdjAttr, Value: []byte(strconv.Itoa(*c.OomScoreAdj))})
	}
	r.AddData(&libcontainer.Boolmsg{Type: libcontainer.RootlessEUIDAttr, Value: c.RootlessEUID})
	return r.Serialize(), nil
}

// syncMessage is one packet of the sync socket.
type syncMessage struct {
	Type  string           `json:"type"`
	Flags int              `json:"flags"`
	Arg   *json.RawMessage `json:"arg,omitempty"`
}

// readSync returns nil at the end: the init has closed the socket, and goes on alone.
func readSync(f *os.File) (*syncMessage, error) {
	size, err := recvRetry(f, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
	if err != nil || size == 0 {
		return nil, err
	}
	packet := make([]byte, size)
	n, err := recvRetry(f, packet, 0)
	if err != nil {
		return nil, err
	}
	var m syncMessage
	if err := json.Unmarshal(packet[:n], &m); err != nil {
		return nil, fmt.Errorf("decode packet of init: %w", err)
	}
	if m.Type != "procError" {
		return &m, nil
	}
	var said struct {
		Message string `json:"message"`
	}
	if m.Arg == nil {
		return nil, errors.New("init has failed and does not say why")
	}
	if err := json.Unmarshal(*m.Arg, &said); err != nil {
		return nil, fmt.Errorf("decode error of init: %w", err)
	}
	return nil, errors.New(said.Message)
}

// recvRetry is recvfrom(2) on a blocking socket: an answer of the init takes a part of a millisecond, at most its mounts.
func recvRetry(f *os.File, p []byte, flags int) (int, error) {
	for {
		n, _, err := unix.Recvfrom(int(f.Fd()), p, flags)
		if !errors.Is(err, unix.EINTR) {
			return n, os.NewSyscallError("recvfrom", err)
		}
	}
}

func writeSync(f *os.File, kind string) error {
	raw, err := json.Marshal(syncMessage{Type: kind})
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	return err
}

// readPids reads what the C half says: the processes that it has made, of which the second is the init.
func readPids(f *os.File) (first, init int, err error) {
	var pids struct {
		First int `json:"stage1_pid"`
		Init  int `json:"stage2_pid"`
	}
	line := make([]byte, 128)
	n, err := f.Read(line)
	if err != nil {
		return 0, 0, err
	}
	if err := json.Unmarshal(bytes.TrimSpace(line[:n]), &pids); err != nil {
		return 0, 0, err
	}
	return pids.First, pids.Init, nil
}
