package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coracle-cri/coracle/ctr/wire"
)

const (
	// lostExitCode stands for an exit that nobody saw. The CRI has no code of its own for it; 255 is what the
	// kubelet knows from other runtimes.
	lostExitCode = 255
)

func (k *Keeper) recordPath(id string) string {
	return filepath.Join(k.recordDir(), id+wire.RecordSuffix)
}

func (k *Keeper) writeRecord(s wire.State) error {
	raw, err := json.Marshal(wire.Record{Version: wire.RecordVersion, State: s})
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if err := writeFile(k.recordPath(s.ID), raw); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// recordRetry is how long a full runtime directory is left alone before a record is tried again.
const recordRetry = time.Second

// persist writes the record of s, now or, where there is no room, as soon as there is. The caller holds c.record.
func (c *container) persist(s wire.State) {
	err := c.keeper.writeRecord(s)
	if err == nil || c.behind {
		return // catchUp writes what is then the state
	}
	c.keeper.log.Error("container state is not on disk: it is tried again", "container", c.id, "finished", s.Exited(), "exit_code", s.ExitCode, "error", err)
	c.behind = true
	c.keeper.tasks.Go(c.catchUp)
}

// catchUp ends with the record on disk, with the container, or with the keeper.
func (c *container) catchUp() {
	tick := time.NewTicker(recordRetry)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-c.keeper.stopped.Done():
			return
		}
		if c.caughtUp() {
			return
		}
	}
}

func (c *container) caughtUp() bool {
	c.record.Lock()
	defer c.record.Unlock()
	if !c.removed {
		if err := c.keeper.writeRecord(c.snapshot()); err != nil {
			return false
		}
		c.keeper.log.Warn("container state is on disk again", "container", c.id)
	}
	c.behind = false
	return true
}

// removeRecord removes whatever is in the place of the record: else the container could not be deleted.
func (k *Keeper) removeRecord(id string) error {
	if err := os.RemoveAll(k.recordPath(id)); err != nil {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

// writeFile replaces path by raw so that a crash leaves either the old content or the new.
func writeFile(path string, raw []byte) (err error) {
	temp := path + ".tmp"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(temp))
		}
	}()
	if _, err = f.Write(raw); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// loadRecords takes over the records of an earlier keeper. None of those containers runs: their pid namespace
// ended with that keeper. A record that cannot be read is set aside, for people to look at.
func (k *Keeper) loadRecords() error {
	entries, err := os.ReadDir(k.recordDir())
	if err != nil {
		return fmt.Errorf("read record directory: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(k.recordDir(), e.Name())
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("remove half a record: %w", err)
			}
			continue
		}
		if !strings.HasSuffix(e.Name(), wire.RecordSuffix) {
			continue
		}
		if err := k.loadRecord(path); err != nil {
			aside := path + ".unreadable"
			err = errors.Join(err, os.RemoveAll(aside), os.Rename(path, aside))
			k.log.Error("record set aside: its container is unknown from now on", "path", aside, "cause", err)
		}
	}
	return nil
}

func (k *Keeper) loadRecord(path string) error {
	s, err := wire.ReadRecord(path)
	if err != nil {
		return err
	}
	if !s.Exited() {
		s.FinishedAt, s.ExitCode = time.Now(), lostExitCode
		s.Error = "the keeper ended before the container did: its exit code is lost"
		if err := k.writeRecord(s); err != nil {
			return err
		}
	}
	c := newContainer(k, s.ID)
	c.state = s
	close(c.ready)
	close(c.dead)
	close(c.exited)
	k.containers[s.ID] = c
	return nil
}
