package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// census is what the kernel and the disk have of a node, a line each, and what can be told of it by id. It is only worth
// something while no operation is under way.
type census struct {
	lines  []string
	mounts map[string]bool              // mount points
	live   map[int]bool                 // children of the keeper but for the daemon, as the node numbers processes
	links  map[string]bool              // pods that have a link
	owned  map[string]map[string]string // kind of thing → id of the pod or container → the thing
}

var idForm = regexp.MustCompile(`\b(?:pod)?([0-9a-f]{64})\b`)

// idIn is the first id in a text, "" where there is none.
func idIn(text string) string {
	if found := idForm.FindStringSubmatch(text); found != nil {
		return found[1]
	}
	return ""
}

func (n *node) census() (*census, error) {
	c := &census{mounts: map[string]bool{}, live: map[int]bool{}, links: map[string]bool{}, owned: map[string]map[string]string{}}
	keeper, err := n.keeper()
	if err != nil {
		return nil, err
	}
	for _, count := range []func(keeper int) error{
		func(int) error { return c.countFiles(n.runtimeDir(), n.dataDir()) }, func(int) error { return c.countCgroups(n) },
		func(keeper int) error { return c.countMounts(n, keeper) }, c.countProcesses,
		func(int) error { return c.countLinks(n) }, func(int) error { return c.countPorts(n) },
	} {
		if err := count(keeper); err != nil {
			return nil, fmt.Errorf("take a census: %w", err)
		}
	}
	slices.Sort(c.lines)
	return c, nil
}

func (c *census) add(kind, what string) {
	c.lines = append(c.lines, kind+" "+what)
	for _, found := range idForm.FindAllStringSubmatch(what, -1) {
		if c.owned[kind] == nil {
			c.owned[kind] = map[string]string{}
		}
		c.owned[kind][found[1]] = what
	}
}

// ours are files whose content or presence says nothing of a pod: logs, and where the addresses go on.
var ours = regexp.MustCompile(`/(node\.log|last_reserved_ip\.\d)$`)

func (c *census) countFiles(dirs ...string) error {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // it went meanwhile, and has let go of its owner
			case err != nil && !errors.Is(err, fs.ErrPermission):
				return err
			}
			short := strings.TrimPrefix(path, filepath.Dir(dir))
			if !ours.MatchString(path) {
				c.add(fileKind(short), short)
			}
			if filepath.Base(filepath.Dir(path)) == "layers" || filepath.Base(filepath.Dir(filepath.Dir(path))) == "rootfs" ||
				errors.Is(err, fs.ErrPermission) {
				return skip(d) // what is in a layer is the image's affair
			}
			return addresses(c, path, d)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func skip(d fs.DirEntry) error {
	if d.IsDir() {
		return filepath.SkipDir
	}
	return nil
}

// addresses tells whose an address is.
func addresses(c *census, path string, d fs.DirEntry) error {
	if filepath.Base(filepath.Dir(path)) != "ipam" || d.IsDir() || net.ParseIP(filepath.Base(path)) == nil {
		return nil
	}
	owner, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	c.add("address", idIn(string(owner)))
	return nil
}

func fileKind(path string) string {
	for _, kind := range []string{"pods", "containers", "rootfs", "volumes", "keeper"} {
		if filepath.Base(filepath.Dir(path)) == kind {
			return strings.TrimPrefix(filepath.Dir(path), "/coracle/")
		}
	}
	return "file"
}

func (c *census) countCgroups(n *node) error {
	var record struct{ Cgroup string }
	raw, err := os.ReadFile(filepath.Join(n.runtimeDir(), "node.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &record); err != nil || record.Cgroup == "" {
		return err
	}
	return filepath.WalkDir(record.Cgroup, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			c.add("cgroup", strings.TrimPrefix(path, record.Cgroup))
		}
		return nil // it may go while it is walked
	})
}

func (c *census) countMounts(n *node, keeper int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", keeper))
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if fields := strings.Fields(s.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], n.dir+"/") {
			c.mounts[fields[4]] = true
			c.add("mount", strings.TrimPrefix(fields[4], n.dir))
		}
	}
	return s.Err()
}

func (c *census) countProcesses(keeper int) error {
	for _, pid := range children(keeper) {
		args := cmdline(pid)
		if len(args) > 1 && args[1] == "daemon" {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // it has ended
		}
		status := string(raw)
		_, ids, _ := strings.Cut(status, "\nNSpid:")
		ids, _, _ = strings.Cut(ids, "\n")
		numbers := strings.Fields(ids)
		if strings.Contains(status, "\nState:\tZ") || len(numbers) < 2 {
			continue
		}
		inside, err := strconv.Atoi(numbers[1]) // the first is how this test numbers it, the second how the keeper does
		if err != nil {
			return err
		}
		c.live[inside] = true
		c.add("process", strings.Join(args, " "))
	}
	return nil
}

// countLinks asks ip(8), which every node needs.
func (c *census) countLinks(n *node) error {
	out, err := n.enter("ip", "-o", "link", "show", "type", "veth")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		id := idIn(line)
		c.links[id] = true
		c.add("link", id)
	}
	return nil
}

// countPorts asks RootlessKit which ports of the host it has published.
func (c *census) countPorts(n *node) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(n.runtimeDir(), "ports.sock"))
	}}
	answer, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("http://rootlesskit/v1/ports")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	var ports []struct{ Spec struct{ ParentPort int } }
	if err := json.NewDecoder(answer.Body).Decode(&ports); err != nil {
		return err
	}
	for _, p := range ports {
		c.add("port", strconv.Itoa(p.Spec.ParentPort))
	}
	return nil
}

// since lists what is in c and not in before, and the reverse. Equal things count as often as they are there.
func (c *census) since(before *census) []string {
	var out []string
	count := map[string]int{}
	for _, l := range before.lines {
		count[l]--
	}
	for _, l := range c.lines {
		count[l]++
	}
	for l, n := range count {
		switch {
		case n > 0:
			out = append(out, fmt.Sprintf("left behind: %s (%d)", l, n))
		case n < 0:
			out = append(out, fmt.Sprintf("lost: %s (%d)", l, -n))
		}
	}
	slices.Sort(out)
	return out
}

// same waits until the node has what it had before: some things go a moment after the call that gave them up.
func (n *node) same(before *census) error {
	return n.settles(func(now *census) error {
		if diff := now.since(before); len(diff) > 0 {
			return errors.New(strings.Join(diff, "\n"))
		}
		return nil
	})
}

// settles calls probe with one census after the other until it returns nil, or the last error.
func (n *node) settles(probe func(*census) error) error {
	deadline := time.Now().Add(15 * time.Second)
	for {
		now, err := n.census()
		if err == nil {
			err = probe(now)
		}
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
