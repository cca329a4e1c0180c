package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// settle is how long a node is left alone after its start before its memory is looked at, and rested how long after work.
const (
	settle = 2 * time.Second
	rested = 25 * time.Second
)

// cold starts and ends each node several times, and looks at the memory of the last one.
func (c *comparison) cold(ctx context.Context) error {
	rounds := max(2, c.rounds(10))
	for i := range rounds {
		for _, n := range c.own() {
			ms, err := n.start(ctx, c.dir)
			if err != nil {
				return err
			}
			if i > 0 { // the first makes its directories, and reads the programs from the disk
				c.got.add(rowCold, n.name, ms)
			}
			if i >= rounds-2 {
				time.Sleep(settle)
				workload, others, guessed := pss(tree(n.root))
				c.got.add(rowIdle, n.name, workload+others)
				if i == rounds-1 && len(guessed) > 0 {
					c.remark(fmt.Sprintf("Of %s of %s the resident size is counted: its memory may not be looked into.", guessed, n.name))
				}
			}
			if err := n.stop(); err != nil {
				return err
			}
		}
	}
	return nil
}

// calls runs pods one after another, with and without a seccomp profile.
func (c *comparison) calls(ctx context.Context) error {
	for range c.rounds(40) {
		for _, n := range c.nodes {
			for _, seccomp := range []bool{false, true} {
				took, err := n.life(ctx, podOptions{seccomp: seccomp})
				if err != nil {
					return fmt.Errorf("%s: %w", n.name, err)
				}
				if seccomp {
					c.got.add(rowSeccomp, n.name, took[rowRunning])
					continue
				}
				for _, row := range lifeRows {
					c.got.add(row, n.name, took[row])
				}
			}
		}
	}
	return nil
}

// fifty runs 50 pods at the same time, asks for them, restarts the daemon and removes them.
func (c *comparison) fifty(ctx context.Context) error {
	for range max(1, c.rounds(3)) {
		for _, n := range c.nodes {
			if err := c.fiftyOf(ctx, n); err != nil {
				return fmt.Errorf("%s: %w", n.name, err)
			}
		}
	}
	return nil
}

// count pods are started and ended, atOnce at a time.
const count, atOnce = 50, 10

func (c *comparison) fiftyOf(ctx context.Context, n *node) (err error) {
	used, counted := n.cpu()
	began := time.Now()
	fleet, err := n.launchMany(ctx, count, atOnce)
	took := since(began)
	if err != nil {
		return errors.Join(err, n.endMany(ctx, fleet, atOnce))
	}
	c.got.add(rowFifty, n.name, took)
	if after, ok := n.cpu(); ok && counted {
		c.got.add(rowFiftyCPU, n.name, (after-used)*1000/count)
	}
	err = c.lists(ctx, n, fleet)
	if err == nil && n.kind != nil {
		err = c.restart(ctx, n)
	}
	began = time.Now()
	if err := errors.Join(err, n.endMany(ctx, fleet, atOnce)); err != nil {
		return err
	}
	c.got.add(rowFiftyEnd, n.name, since(began))
	return nil
}

// restart kills the daemon, which is started again by whatever does so, and waits for its answer.
func (c *comparison) restart(ctx context.Context, n *node) error {
	server, err := n.server()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := server.kill(); err != nil {
		return err
	}
	ms, err := n.firstAnswer(ctx, began)
	if err != nil {
		return err
	}
	c.got.add(rowRestart, n.name, ms)
	return n.answers(ctx)
}

// listRow is the row of a call with that many pods running.
func listRow(call string, pods int) string { return fmt.Sprintf("%s, %d pods", call, pods) }

// lists times what a kubelet asks again and again.
func (c *comparison) lists(ctx context.Context, n *node, f fleet) error {
	for i := range c.rounds(20) + 1 {
		one := f[i*len(f)/21]
		for name, call := range n.asks(one) {
			began := time.Now()
			count, err := call(ctx)
			took := since(began)
			if err != nil && n != c.nodes[0] {
				c.remark(fmt.Sprintf("%s does not answer %s (%s).", n.name, name, status.Code(err)))
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if count != len(f) && count >= 0 {
				return fmt.Errorf("%s has %d entries, of %d pods", name, count, len(f))
			}
			if i > 0 {
				c.got.add(listRow(name, len(f)), n.name, took)
			}
		}
	}
	return nil
}

// asks are the calls, each with the number of entries in its answer, or -1.
func (n *node) asks(r running) map[string]func(context.Context) (int, error) {
	return map[string]func(context.Context) (int, error){
		"ListPodSandbox": func(ctx context.Context) (int, error) {
			a, err := n.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return len(a.GetItems()), err
		},
		"ListContainers": func(ctx context.Context) (int, error) {
			a, err := n.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return len(a.GetContainers()), err
		},
		"PodSandboxStatus": func(ctx context.Context) (int, error) {
			_, err := n.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: r.pod})
			return -1, err
		},
		"ContainerStatus": func(ctx context.Context) (int, error) {
			_, err := n.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: r.container})
			return -1, err
		},
		"ListContainerStats": func(ctx context.Context) (int, error) {
			a, err := n.runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return len(a.GetStats()), err
		},
		"ListPodSandboxStats": func(ctx context.Context) (int, error) {
			a, err := n.runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return len(a.GetStats()), err
		},
	}
}

// atRest is the memory in KiB of a node that has done nothing for a while.
func (n *node) atRest() float64 {
	time.Sleep(rested)
	_, others, _ := pss(tree(n.root))
	return others
}

// fiveHundred runs 500 pods, one after another, and asks for them. So many, since the memory of a daemon at rest differs by
// two MiB from one look to the next.
func (c *comparison) fiveHundred(ctx context.Context) error {
	for _, n := range c.nodes {
		var without float64
		if n.root != 0 {
			without = n.atRest()
		}
		fleet, err := n.launchMany(ctx, 500, 1)
		if err == nil {
			for i, r := range fleet {
				switch {
				case i >= 5 && i < 15:
					c.got.add(rowFirst, n.name, r.took[rowRunning])
				case i >= 490:
					c.got.add(rowLast, n.name, r.took[rowRunning])
				}
			}
			err = c.lists(ctx, n, fleet)
			if err == nil && n.root != 0 {
				c.got.add(rowPodPSS, n.name, (n.atRest()-without)/float64(len(fleet)))
			}
		}
		if err := errors.Join(err, n.endMany(ctx, fleet, 10)); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
	}
	return nil
}

// pulls pulls the large images from a registry on loopback, and removes them. The daemon is started anew before each, so
// that its memory is that of one pull.
func (c *comparison) pulls(ctx context.Context) error {
	for i := range max(2, c.rounds(6)) {
		for _, p := range []pulled{{imageSix, rowSix, rowSixCPU, rowSixMem}, {imageOne, rowOne, rowOneCPU, rowOneMem}} {
			for _, n := range c.nodes {
				if err := c.pulledBy(ctx, n, p, i > 0); err != nil {
					return fmt.Errorf("%s: %w", n.name, err)
				}
			}
		}
	}
	return nil
}

// pulled is an image that is pulled, and the rows of it.
type pulled struct{ image, took, cpu, mem string }

func (c *comparison) pulledBy(ctx context.Context, n *node, p pulled, counts bool) error {
	if n.kind != nil {
		server, err := n.server()
		if err == nil {
			err = server.kill()
		}
		if err == nil {
			err = n.answers(ctx)
		}
		if err != nil {
			return err
		}
	}
	time.Sleep(settle / 2)
	used, counted := n.cpu()
	high := startPeak(tree(n.root))
	began := time.Now()
	if err := n.pull(ctx, n.registry+"/"+p.image); err != nil {
		return err
	}
	took := since(began)
	if after, ok := n.cpu(); ok && counted && counts {
		c.got.add(p.cpu, n.name, (after-used)*1000)
	}
	if counts {
		c.got.add(p.took, n.name, took)
		c.got.add(p.mem, n.name, high.growth())
	}
	return n.removeImage(ctx, n.registry+"/"+p.image)
}

// counted does something and returns what adds the CPU time that the node has used meanwhile, times a factor, to a row.
func (c *comparison) counted(n *node, row string, times float64, do func()) (add func()) {
	before, ok := n.cpu()
	do()
	after, still := n.cpu()
	return func() {
		if ok && still {
			c.got.add(row, n.name, (after-before)*1000*times)
		}
	}
}

// streams measures what flows from a container to a client and to its log.
func (c *comparison) streams(ctx context.Context) error {
	for range max(1, c.rounds(3)) {
		for _, n := range c.nodes {
			r, err := n.launch(ctx, podOptions{})
			if err != nil {
				return errors.Join(err, n.discard(ctx, r.pod))
			}
			var rate float64
			used := c.counted(n, rowStreamCPU, 1, func() { rate, err = n.execStream(ctx, r) })
			if err := errors.Join(err, n.end(ctx, r)); err != nil {
				return err
			}
			used()
			c.got.add(rowStream, n.name, rate)
			used = c.counted(n, rowLogCPU, 1e9/(linesCount*linesRepeated*100), func() { rate, err = n.logLines(ctx) })
			if err != nil {
				return fmt.Errorf("%s: %w", n.name, err)
			}
			used()
			c.got.add(rowLog, n.name, rate)
		}
	}
	return nil
}
