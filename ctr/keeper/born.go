package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/exeseal"

	"github.com/coracle-cri/coracle/ctr/wire"
)

// born is a container whose init was made by birth, as its later processes are.
type born struct {
	config *configs.Config
	cgroup cgroups.Manager
	pid    int
}

// bear makes the init. libcontainer has checked the configuration and has made the directory of the container, and takes
// both away, and the cgroup, at the end.
func (e *inProcess) bear(config *configs.Config, p *libcontainer.Process) (_ child, err error) {
	var undo undoStack
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.run())
		}
	}()
	program, err := e.keeper.sealed.open(e.keeper.stateDir())
	if err != nil {
		return child{}, err
	}
	group, err := manager.New(config.Cgroups)
	if err != nil {
		return child{}, fmt.Errorf("prepare cgroup: %w", err)
	}
	if err := group.Apply(-1); err != nil { // makes it, and puts nobody there
		return child{}, fmt.Errorf("make cgroup: %w", err)
	}
	undo.push(group.Destroy)
	fifo, err := makeFifo(e.dir)
	if err != nil {
		return child{}, err
	}
	undo.push(func() error { return os.Remove(filepath.Join(e.dir, "exec.fifo")) })
	defer wire.CloseFiles([]*os.File{fifo})

	joined := map[configs.NamespaceType]string{}
	for _, ns := range config.Namespaces {
		joined[ns.Type] = ns.Path
	}
	b := birth{config: config, said: newInitConfig(e.id, config, p), cgroup: group, into: group.Path(""), own: true,
		moved: e.keeper.bornElsewhere, joined: joined, flags: config.Namespaces.CloneFlags()}
	b.said.Cgroup2Path = b.into
	pid, err := b.run(p, program, fifo)
	if err != nil {
		return child{}, fmt.Errorf("start container process: %w", err)
	}
	e.born = &born{config: config, cgroup: group, pid: pid}
	return child{pid: pid, collect: waitPid(pid)}, nil
}

// bearExec makes a further process, in a cgroup below the container's, or in that where cgroup is "".
func (e *inProcess) bearExec(p *libcontainer.Process, cgroup string) (child, error) {
	if p.CPUAffinity != nil {
		return child{}, fmt.Errorf("cpu affinity of an exec: %w", wire.ErrBadRequest) // nothing here asks for it
	}
	program, err := e.keeper.sealed.open(e.keeper.stateDir())
	if err != nil {
		return child{}, err
	}
	joined := map[configs.NamespaceType]string{}
	for _, ns := range e.born.config.Namespaces {
		joined[ns.Type] = ns.GetPath(e.born.pid)
	}
	b := birth{config: e.born.config, said: newInitConfig(e.id, e.born.config, p), cgroup: e.born.cgroup, into: cgroup, own: true,
		moved: e.keeper.bornElsewhere, joined: joined}
	b.said.Cgroup2Path = e.born.cgroup.Path("")
	if cgroup == "" {
		b.into, b.own = b.said.Cgroup2Path, false
	}
	pid, err := b.run(p, program, nil)
	if err != nil {
		return child{}, fmt.Errorf("start process: %w", err)
	}
	return child{pid: pid, collect: waitPid(pid)}, nil
}

// bornElsewhere says once that processes are moved to their cgroups: it is slower, and no fault of theirs.
func (k *Keeper) bornElsewhere(why error) {
	k.moved.Do(func() {
		k.log.Warn("processes cannot be born in their cgroups and are moved there: a start takes some 10 ms longer", "cause", why)
	})
}

// save leaves the state that libcontainer would have written at the start, for another keeper to load. start is the init's
// start time (proc_pid_stat(5)).
func (b *born) save(dir, id string, start uint64) error {
	state := libcontainer.State{
		BaseState:      libcontainer.BaseState{ID: id, InitProcessPid: b.pid, InitProcessStartTime: start, Config: *b.config},
		CgroupPaths:    b.cgroup.GetPaths(),
		NamespacePaths: map[configs.NamespaceType]string{},
	}
	for _, ns := range b.config.Namespaces {
		state.NamespacePaths[ns.Type] = ns.GetPath(b.pid)
	}
	raw, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("encode container state: %w", err)
	}
	// libcontainer's name for it. Whatever else is there would keep every other container's keeper from being replaced.
	path := filepath.Join(dir, "state.json")
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("write container state: %w", err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("write container state: %w", err)
	}
	return nil
}

// rebear goes on to make the processes of a container that libcontainer has loaded, as the keeper before did.
func (e *inProcess) rebear() error {
	config := e.lc.Config()
	group, err := manager.New(config.Cgroups)
	if err != nil {
		return fmt.Errorf("prepare cgroup: %w", err)
	}
	state, err := e.lc.State()
	if err != nil {
		return fmt.Errorf("load container: %w", err)
	}
	e.born = &born{config: &config, cgroup: group, pid: state.InitProcessPid}
	return nil
}

// sealedProgram is the program that is executed for each process.
type sealedProgram struct {
	mu   sync.Mutex
	file *os.File
}

// open returns this program as a file that nobody can write: what a container's init executes, and so can be reached
// from inside by /proc/PID/exe while it does (CVE-2019-5736). libcontainer seals it anew for each process, for want of
// knowing that the last one is whole. Here one does for all: it is read through a read-only overlay, or is a sealed
// memfd, so that no container can change it for the next one.
func (s *sealedProgram) open(dir string) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		file, err := exeseal.CloneSelfExe(dir)
		if err != nil {
			return nil, fmt.Errorf("seal the keeper's program: %w", err)
		}
		s.file = file
	}
	return s.file, nil
}

func (s *sealedProgram) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil {
		_ = s.file.Close()
		s.file = nil
	}
}
