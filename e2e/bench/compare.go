package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// comparison is one run: every section measures every runtime in turn, a round of one, then a round of the next, so that
// whatever else happens on the machine meets all of them.
type comparison struct {
	nodes    []*node
	registry *registryServer
	got      figures
	remarks  []string
	quick    bool
	dir      string // where the nodes keep their data
	earlier  *raw   // a run whose figures are kept where this one has none
}

// dataDir is where a disk is not what is measured: some file systems' creation of files takes ten times longer when
// others were removed before, as here in each round (ext4 without a journal looks at each of them).
func dataDir() string {
	const shm, room = "/dev/shm", 6 << 30
	var fs unix.Statfs_t
	if unix.Statfs(shm, &fs) == nil && fs.Type == unix.TMPFS_MAGIC && fs.Bavail*uint64(fs.Bsize) > room {
		return shm
	}
	return os.TempDir()
}

// section is a part of a run that can be left out.
type section struct {
	name string
	run  func(context.Context) error
}

func compareCommand(args []string) error {
	f := flag.NewFlagSet("bench compare", flag.ExitOnError)
	programs := f.String("programs", "bin", "directory of coracle and coracle-keeper")
	peer := f.String("peer", "", "directory of rootless containerd's programs, as make peer builds them")
	out := f.String("out", ".cache/bench", "directory for the figures (JSON), the table (Markdown) and the picture (SVG)")
	only := f.String("rows", ".", "sections to run, a regular expression: cold, calls, fifty, fivehundred, pull, streams")
	quick := f.Bool("quick", false, "few rounds, and no 500 pods: half a minute, to see whether all works")
	add := f.String("add", "", "figures (JSON) of an earlier run, whose rows are kept where this run has none: for a machine that is quiet for minutes only")
	dir := f.String("dir", dataDir(), "directory below which the nodes keep their data; the default is on tmpfs where there is one with room")
	var sockets []string
	f.Func("socket", "another runtime that runs: NAME=ENDPOINT or NAME=ENDPOINT@PID, of the process that all of its descend from", func(s string) error {
		sockets = append(sockets, s)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return err
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	c := &comparison{got: figures{}, quick: *quick, dir: *dir, nodes: []*node{newCoracle(absolute(*programs))}}
	if *peer != "" {
		c.nodes = append(c.nodes, newContainerd(absolute(*peer)))
	}
	if *add != "" {
		if c.earlier, err = readRaw(*add); err != nil {
			return err
		}
	}
	for _, s := range sockets {
		n, err := newSocket(s)
		if err != nil {
			return err
		}
		c.nodes = append(c.nodes, n)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	began := time.Now()
	err = c.run(ctx, chosen)
	if len(c.got) > 0 { // what was measured before a failure is not lost
		err = errors.Join(err, c.report(*out, began))
	}
	return err
}

// run runs the chosen sections.
func (c *comparison) run(ctx context.Context, chosen *regexp.Regexp) (err error) {
	if c.registry, err = startRegistry(ctx, chosen.MatchString("pull")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.registry.Close()) }()
	defer func() {
		for _, n := range c.nodes {
			if n.client != nil {
				n.client.close()
			}
			err = errors.Join(err, n.stop(), n.remove())
		}
	}()
	c.hear("before the first section")
	if chosen.MatchString("cold") {
		c.say("cold")
		if err := c.cold(ctx); err != nil {
			return fmt.Errorf("cold: %w", err)
		}
	}
	if err := c.ready(ctx); err != nil {
		return err
	}
	sections := []section{{"calls", c.calls}, {"fifty", c.fifty}, {"pull", c.pulls}, {"streams", c.streams}}
	if !c.quick {
		sections = append(sections, section{"fivehundred", c.fiveHundred})
	}
	for _, s := range sections {
		if !chosen.MatchString(s.name) {
			continue
		}
		c.hear("before " + s.name)
		c.say(s.name)
		if err := s.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func (c *comparison) say(what string) {
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format(time.TimeOnly), what)
}

// hear waits for a quiet machine, for a while, and remarks when it did not become one.
func (c *comparison) hear(when string) {
	var why string
	for range 5 {
		if why = noise(); why == "" {
			return
		}
	}
	c.remark("The machine was not quiet " + when + ": " + why + ".")
	c.say("not quiet: " + why)
}

// remark keeps what a reader of the table has to know, once.
func (c *comparison) remark(what string) {
	if !slices.ContainsFunc(c.remarks, func(r string) bool { return r[:min(len(r), 50)] == what[:min(len(what), 50)] }) {
		c.remarks = append(c.remarks, what)
	}
}

// rounds is how many of something to do: fewer in a quick run.
func (c *comparison) rounds(n int) int {
	if c.quick {
		return max(1, n/10)
	}
	return n
}

// own are the nodes that this program starts and ends.
func (c *comparison) own() (out []*node) {
	for _, n := range c.nodes {
		if n.kind != nil {
			out = append(out, n)
		}
	}
	return out
}

// ready starts every node and gets it the small images.
func (c *comparison) ready(ctx context.Context) error {
	for _, n := range c.nodes {
		if n.kind != nil {
			if _, err := n.start(ctx, c.dir); err != nil {
				return err
			}
		}
		n.registry = c.registry.Addr
		if n.network != 0 {
			n.registry = peerRegistry
			if err := c.registry.serveIn(n); err != nil {
				return err
			}
		}
		var err error
		if n.client, err = dial(n.endpoint, n.registry+"/"+imageHello, c.dir); err != nil {
			return err
		}
		if err := n.pull(ctx, n.image); err != nil {
			return fmt.Errorf("%s: %w", n.name, errors.Join(err, n.tail()))
		}
		// The first pod warms caches of the machine's, and is not counted.
		if _, err := n.life(ctx, podOptions{}); err != nil {
			return fmt.Errorf("%s: %w", n.name, errors.Join(err, n.tail()))
		}
	}
	return nil
}

func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	return abs
}
