package netslirp

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/rootless-containers/rootlesskit/v3/pkg/network"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port/builtin"
)

// DefaultDriver is the driver of an empty name.
const DefaultDriver = "slirp4netns"

// DefaultMTU is the largest that the user-mode networks take. A packet costs them a copy and two system calls
// whatever its size, so that throughput grows with it: 2.5 Gbit/s against 0.75 at 1500.
const DefaultMTU = 65520

// DriverConfig chooses and sets a user-mode network.
type DriverConfig struct {
	Name                string    // name in the registry; "" is DefaultDriver
	MTU                 int       // 0 is DefaultMTU
	DisableHostLoopback bool      // pods cannot reach the host's 127.0.0.1 through the gateway's address
	Binary              string    // the driver's program, by name or path; "" is the driver's own name
	Log                 io.Writer // what the program prints; nil is standard error
}

// driver is one user-mode network. Parent halves run outside the user namespace, child halves inside.
type driver struct {
	check  func(DriverConfig) error
	parent func(DriverConfig) (network.ParentDriver, error)
	child  func() network.ChildDriver
}

var drivers = map[string]driver{
	"slirp4netns": {check: checkSlirp4netns, parent: slirp4netnsParent, child: slirp4netnsChild},
}

// ParentDriver returns the halves of the network and of the port driver that run outside the user namespace. It
// writes in stateDir, rootlesskit's: call it after parent.InitStateDir, which empties that directory.
func ParentDriver(cfg DriverConfig, stateDir string) (network.ParentDriver, port.ParentDriver, error) {
	d, cfg, err := lookupDriver(cfg)
	if err != nil {
		return nil, nil, err
	}
	network, err := d.parent(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("make network driver %s: %w", cfg.Name, err)
	}
	const runIPTables = false // the client's source address is kept by portChild and the firewall
	ports, err := builtin.NewParentDriver(portLog{cfg.Log}, stateDir, runIPTables)
	if err != nil {
		return nil, nil, fmt.Errorf("make port driver: %w", err)
	}
	return network, ports, nil
}

// portLog leaves out what RootlessKit's port driver prints for each port that is given back: its accept(2) ends with the
// listener, and it takes that for an error.
type portLog struct{ io.Writer }

func (l portLog) Write(line []byte) (int, error) {
	if bytes.HasPrefix(line, []byte("accept: ")) && bytes.Contains(line, []byte(net.ErrClosed.Error())) {
		return len(line), nil
	}
	return l.Writer.Write(line)
}

// ChildDriver returns the halves that run inside the user namespace.
func ChildDriver(name string, log io.Writer) (network.ChildDriver, port.ChildDriver, error) {
	d, cfg, err := lookupDriver(DriverConfig{Name: name, Log: log})
	if err != nil {
		return nil, nil, err
	}
	return d.child(), portChild{log: cfg.Log}, nil
}

// CheckDriver tells, before anything is started, whether the driver can work here. Its error is one sentence with
// the cause and the command that mends it.
func CheckDriver(cfg DriverConfig) error {
	d, cfg, err := lookupDriver(cfg)
	if err != nil {
		return err
	}
	return d.check(cfg)
}

func lookupDriver(cfg DriverConfig) (driver, DriverConfig, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultDriver
	}
	d, ok := drivers[cfg.Name]
	if !ok {
		return driver{}, cfg, fmt.Errorf("network driver %q is unknown, choose one of: %s: %w",
			cfg.Name, strings.Join(driverNames(), ", "), ErrInvalid)
	}
	if cfg.Binary == "" {
		cfg.Binary = cfg.Name
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Log == nil {
		cfg.Log = os.Stderr
	}
	return d, cfg, nil
}

func driverNames() []string {
	names := make([]string, 0, len(drivers))
	for name := range drivers {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
