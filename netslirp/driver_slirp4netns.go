package netslirp

import (
	"fmt"

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
	if err := checkTun("/dev/net/tun"); err != nil {
		return err
	}
	if _, err := slirp4netns.DetectFeatures(cfg.Binary); err != nil {
		return fmt.Errorf("%s does not work (%w); install it again: %s", cfg.Binary, err, installCommand("slirp4netns"))
	}
	return nil
}

// slirp4netnsParent confines slirp4netns as far as it goes. --enable-seccomp denies it what it never needs
// (execve, ptrace, mount…), and it keeps running as the ordinary user. --enable-sandbox cannot be had: it fails
// with a namespace that is given by path, as the node's is (rootless-containers/slirp4netns#317), and
// rootlesskit refuses it.
func slirp4netnsParent(cfg DriverConfig) (network.ParentDriver, error) {
	features, err := slirp4netns.DetectFeatures(cfg.Binary)
	if err != nil {
		return nil, err
	}
	const sandbox, ipv6 = false, false
	seccomp := features.SupportsEnableSeccomp && features.KernelSupportsEnableSeccomp
	return slirp4netns.NewParentDriver(cfg.Log, cfg.Binary, cfg.MTU, nil, "tap0",
		cfg.DisableHostLoopback, "", sandbox, seccomp, ipv6)
}

func slirp4netnsChild() network.ChildDriver { return slirp4netns.NewChildDriver() }
