package netslirp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api"
	"github.com/rootless-containers/rootlesskit/v3/pkg/messages"
	"github.com/rootless-containers/rootlesskit/v3/pkg/network"
	"github.com/rootless-containers/rootlesskit/v3/pkg/network/slirp4netns"
)

// slirp4netnsMaxMTU is the largest that slirp4netns --mtu takes.
const slirp4netnsMaxMTU = 65521

func checkSlirp4netns(cfg DriverConfig) error {
	if cfg.MTU < 68 || cfg.MTU > slirp4netnsMaxMTU { // 68: the least that IPv4 allows (RFC 791)
		return fmt.Errorf("MTU %d is out of range: slirp4netns takes 68 to %d: %w", cfg.MTU, slirp4netnsMaxMTU, ErrInvalid)
	}
	if err := checkProgram(cfg.Binary, "slirp4netns"); err != nil {
		return err
	}
	// rootlesskit makes the TAP device with `nsenter … ip tuntap add`, and the child sets it up with ip.
	if err := checkProgram("ip", "ip"); err != nil {
		return err
	}
	if err := checkProgram("nsenter", "nsenter"); err != nil {
		return err
	}
	if err := checkTun(tunDevice); err != nil {
		return err
	}
	if _, err := slirp4netns.DetectFeatures(cfg.Binary); err != nil {
		return fmt.Errorf("%s does not work (%w); install it again: %s", cfg.Binary, err, installCommand("slirp4netns"))
	}
	return nil
}

// slirp4netnsParent confines slirp4netns as far as it goes. --enable-seccomp denies it what it never needs
// (execve, ptrace, mount…), and it keeps running as the ordinary user. --enable-sandbox cannot be had: it fails
// with a namespace that is given by path, as the node's is (rootless-containers/slirp4netns#317). --enable-ipv6 is
// left out: docs/decisions.md says why.
func slirp4netnsParent(cfg DriverConfig) (network.ParentDriver, error) {
	features, err := slirp4netns.DetectFeatures(cfg.Binary)
	if err != nil {
		return nil, err
	}
	args := []string{"--mtu=" + strconv.Itoa(cfg.MTU), "--ready-fd=3"}
	if cfg.DisableHostLoopback {
		args = append(args, "--disable-host-loopback")
	}
	if features.SupportsEnableSeccomp && features.KernelSupportsEnableSeccomp {
		args = append(args, "--enable-seccomp")
	}
	return &slirp{cfg: cfg, args: args}, nil
}

func slirp4netnsChild() network.ChildDriver { return slirp4netns.NewChildDriver() }

// The layout of slirp4netns's network, which it does not tell (slirp4netns(1)).
const (
	slirpTap     = "tap0"
	slirpIP      = "10.0.2.100"
	slirpBits    = 24
	slirpGateway = "10.0.2.2"
	slirpDNS     = "10.0.2.3"
)

// slirp is the outer half of the driver: as rootlesskit's, but that it starts slirp4netns again when it ends. The
// TAP device and its address are the node's and stay, and its default route is set again; connections through it are lost.
type slirp struct {
	cfg  DriverConfig
	args []string
}

var _ network.ParentDriver = (*slirp)(nil)

func (s *slirp) MTU() int { return s.cfg.MTU }

func (s *slirp) Info(context.Context) (*api.NetworkDriverInfo, error) {
	return &api.NetworkDriverInfo{Driver: slirp4netns.DriverName, DNS: []net.IP{net.ParseIP(slirpDNS)}, ChildIP: net.ParseIP(slirpIP)}, nil
}

// ConfigureNetwork returns when slirp4netns serves. cleanup ends it, and waits for that.
func (s *slirp) ConfigureNetwork(childPID int, _, netNSPath string) (*messages.ParentInitNetworkDriverCompleted, func() error, error) {
	tap := tapDevice{"-t", strconv.Itoa(childPID), "-n" + netNSPath, "-m", "-U", "--preserve-credentials", "ip"}
	if err := tap.run("tuntap", "add", "name", slirpTap, "mode", "tap"); err != nil {
		return nil, nil, fmt.Errorf("make %s: %w", slirpTap, err)
	}
	args := append(s.args, fmt.Sprintf("--userns-path=/proc/%d/ns/user", childPID), "--netns-type=path", netNSPath, slirpTap)
	ctx, cancel := context.WithCancel(context.Background())
	first, done := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		// The kernel counts a child's parent by thread: without this, slirp4netns would die with any thread that
		// happened to start it (PR_SET_PDEATHSIG).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		s.supervise(ctx, args, tap, first)
	}()
	cleanup := func() error {
		cancel()
		<-done
		return nil
	}
	if err := <-first; err != nil {
		return nil, nil, errors.Join(err, cleanup())
	}
	return &messages.ParentInitNetworkDriverCompleted{Dev: slirpTap, IP: slirpIP, Netmask: slirpBits, Gateway: slirpGateway,
		DNS: []string{slirpDNS}, MTU: s.cfg.MTU}, cleanup, nil
}

const (
	slirpLeastPause = 100 * time.Millisecond
	slirpMostPause  = 10 * time.Second
)

// tapDevice is what nsenter needs to run ip in the node.
type tapDevice []string

func (d tapDevice) run(args ...string) error {
	out, err := exec.Command("nsenter", append(slices.Clip([]string(d)), args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run ip %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// down lets nothing through until up is called. The kernel takes the default route away with it.
func (d tapDevice) down() error { return d.run("link", "set", slirpTap, "down") }

func (d tapDevice) up() error {
	if err := d.run("link", "set", slirpTap, "up"); err != nil {
		return err
	}
	return d.run("route", "replace", "default", "via", slirpGateway, "dev", slirpTap)
}

// supervise runs slirp4netns until ctx ends, and sends to first what became of the first start. One that ends soon is
// started again after a pause that grows. While one starts, the device is down, since its filter can only be set then: at
// first it is as it was made, and RootlessKit's child sets it up.
func (s *slirp) supervise(ctx context.Context, args []string, tap tapDevice, first chan<- error) {
	program, err := s.start(ctx, args)
	first <- err
	if err != nil {
		return
	}
	pause := slirpLeastPause
	for {
		started := time.Now()
		if err == nil {
			err = program.wait()
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > slirpMostPause {
			pause = slirpLeastPause
		}
		fmt.Fprintf(s.cfg.Log, "the user-mode network has ended (%v): starting it again in %s; connections through it are lost\n", err, pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, slirpMostPause)
		program, err = s.startAgain(ctx, args, tap)
	}
}

func (s *slirp) startAgain(ctx context.Context, args []string, tap tapDevice) (*slirpProgram, error) {
	if err := tap.down(); err != nil {
		return nil, err
	}
	program, err := s.start(ctx, args)
	if err != nil {
		return nil, err
	}
	if err := tap.up(); err != nil {
		return nil, errors.Join(err, program.cmd.Process.Kill(), program.wait())
	}
	return program, nil
}

// slirpProgram is a slirp4netns that serves once its device is up.
type slirpProgram struct {
	cmd    *exec.Cmd
	filter *tapFilter // nil where this host forbids it
}

func (p *slirpProgram) wait() error {
	err := p.cmd.Wait()
	if p.filter != nil {
		err = errors.Join(err, p.filter.close())
	}
	return err
}

// start returns when slirp4netns serves, or has ended.
func (s *slirp) start(ctx context.Context, args []string) (*slirpProgram, error) {
	ready, inherited, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	cmd := exec.CommandContext(ctx, s.cfg.Binary, args...) // ends it by SIGKILL
	cmd.Stdout, cmd.Stderr = s.cfg.Log, s.cfg.Log
	cmd.ExtraFiles = []*os.File{inherited}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	inherited.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", s.cfg.Binary, err)
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil { // its end is that of slirp4netns
		return nil, fmt.Errorf("start %s: it ended before it was ready: %w", s.cfg.Binary, errors.Join(cmd.Wait(), ctx.Err()))
	}
	// Without it the network serves all the same: what is kept is what pods in the node's network could reach, of which most
	// nodes have none.
	filter, err := filterTap(cmd.Process.Pid)
	if err != nil {
		fmt.Fprintf(s.cfg.Log, "pods in the node's network can send to the host's 127.0.0.1: %v\n", err)
	}
	return &slirpProgram{cmd, filter}, nil
}
