package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
	"github.com/coracle-cri/coracle/rootless"
)

// config is what a user can set: by flag, else environment, else file, else default. The keys of the file are the
// JSON names; `coracle config` prints them all.
type config struct {
	Name       string                           `json:"name"`
	Log        logConfig                        `json:"log"`
	Network    networkConfig                    `json:"network"`
	Limits     string                           `json:"limits"`
	Streaming  streamingConfig                  `json:"streaming"`
	GRPC       grpcConfig                       `json:"grpc"`
	Images     imagesConfig                     `json:"images"`
	CopyUp     []string                         `json:"copyUp"`
	CDIDirs    []string                         `json:"cdiSpecDirs"`
	Registries map[string]images.RegistryConfig `json:"registries"`
	Handlers   map[string]handlerConfig         `json:"handlers"`
}

type logConfig struct {
	Level  string `json:"level"`
	Format string `json:"format"`
}

type networkConfig struct {
	Driver       string `json:"driver"`
	Program      string `json:"program"`
	MTU          int    `json:"mtu"`
	PodCIDR      string `json:"podCIDR"`
	HostLoopback bool   `json:"hostLoopback"`
}

type streamingConfig struct {
	Address string `json:"address"`
}

type grpcConfig struct {
	Reflection bool `json:"reflection"`
	Health     bool `json:"health"`
}

type imagesConfig struct {
	MaxLayerBytes     int64  `json:"maxLayerBytes"`
	MaxLayerEntries   int64  `json:"maxLayerEntries"`
	DockerConfig      string `json:"dockerConfig"`
	RefuseUnmappedIDs bool   `json:"refuseUnmappedIDs"`
}

func defaults() config {
	return config{
		Name:      rootless.DefaultName,
		Log:       logConfig{Level: "info", Format: "text"},
		Network:   networkConfig{Driver: "slirp4netns", Program: "slirp4netns", MTU: 65520, PodCIDR: netslirp.DefaultPodCIDR},
		Limits:    "best-effort",
		Streaming: streamingConfig{Address: "127.0.0.1:0"},
		Images:    imagesConfig{MaxLayerBytes: images.DefaultMaxLayerBytes, MaxLayerEntries: images.DefaultMaxLayerEntries},
		CopyUp:    []string{"/etc", "/run", "/var/lib"},
		CDIDirs:   cdiSpecDirs(),
	}
}

// cdiSpecDirs are the two that the CDI has, and this user's own, which outrank them.
func cdiSpecDirs() []string {
	dirs := []string{"/etc/cdi", "/var/run/cdi"}
	if home, err := os.UserConfigDir(); err == nil {
		dirs = append(dirs, filepath.Join(home, "cdi"))
	}
	if run := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(run) {
		dirs = append(dirs, filepath.Join(run, "cdi"))
	}
	return dirs
}

// key is one scalar setting: its flag, its variable, its place in config.
type key struct {
	name string // of the flag; the variable is CORACLE_ with dashes as underscores
	help string
	path string // in the file
	set  func(*config, string) error
	get  func(config) string
}

func (k key) env() string { return "CORACLE_" + strings.ToUpper(strings.ReplaceAll(k.name, "-", "_")) }

func text(name, path, help string, at func(*config) *string) key {
	return key{name: name, path: path, help: help,
		set: func(c *config, v string) error { *at(c) = v; return nil },
		get: func(c config) string { return *at(&c) }}
}

func oneOf(k key, allowed ...string) key {
	set := k.set
	k.set = func(c *config, v string) error {
		for _, a := range allowed {
			if v == a {
				return set(c, v)
			}
		}
		return fmt.Errorf("%q is none of %s", v, strings.Join(allowed, ", "))
	}
	k.help += " (" + strings.Join(allowed, ", ") + ")"
	return k
}

func number(name, path, help string, set func(*config, int64), get func(config) int64) key {
	return key{name: name, path: path, help: help,
		set: func(c *config, v string) error {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil || n < 0 {
				return fmt.Errorf("%q is not a whole number", v)
			}
			set(c, n)
			return nil
		},
		get: func(c config) string { return strconv.FormatInt(get(c), 10) }}
}

func truth(name, path, help string, at func(*config) *bool) key {
	return key{name: name, path: path, help: help,
		set: func(c *config, v string) error {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("%q is neither true nor false", v)
			}
			*at(c) = b
			return nil
		},
		get: func(c config) string { return strconv.FormatBool(*at(&c)) }}
}

// keys lists every scalar setting once: flags, variables, documentation and validation come from it.
var keys = []key{
	text("name", "name", "name of the node; nodes of other names run side by side", func(c *config) *string { return &c.Name }),
	oneOf(text("log-level", "log.level", "what is logged", func(c *config) *string { return &c.Log.Level }), "debug", "info", "warn", "error"),
	oneOf(text("log-format", "log.format", "how it is logged", func(c *config) *string { return &c.Log.Format }), "text", "json"),
	text("network-driver", "network.driver", "user-mode network driver", func(c *config) *string { return &c.Network.Driver }),
	text("network-program", "network.program", "the driver's program, by name or path", func(c *config) *string { return &c.Network.Program }),
	number("network-mtu", "network.mtu", "MTU of the node's and the pods' interfaces, in bytes",
		func(c *config, n int64) { c.Network.MTU = int(n) }, func(c config) int64 { return int64(c.Network.MTU) }),
	text("pod-cidr", "network.podCIDR", "addresses of pods: one network, or one of IPv4 and one of IPv6 with a comma between them, the one of the pods' IP first; a kubelet may set it too (UpdateRuntimeConfig)",
		func(c *config) *string { return &c.Network.PodCIDR }),
	truth("host-loopback", "network.hostLoopback", "let pods reach the host's 127.0.0.1 as 10.0.2.2", func(c *config) *bool { return &c.Network.HostLoopback }),
	oneOf(text("limits", "limits", "what becomes of a limit that cannot be applied here: left out and shown, or an error", func(c *config) *string { return &c.Limits }), "best-effort", "strict"),
	text("streaming-address", "streaming.address", "loopback address of the exec, attach and port-forward server; port 0 picks one", func(c *config) *string { return &c.Streaming.Address }),
	truth("grpc-reflection", "grpc.reflection", "serve gRPC reflection on the CRI's socket, for grpcurl and the like", func(c *config) *bool { return &c.GRPC.Reflection }),
	truth("grpc-health", "grpc.health", "serve the gRPC health service on the CRI's socket, for probes", func(c *config) *bool { return &c.GRPC.Health }),
	number("max-layer-bytes", "images.maxLayerBytes", "largest size, unpacked, of those layers of an image that are not here yet, all together, in bytes",
		func(c *config, n int64) { c.Images.MaxLayerBytes = n }, func(c config) int64 { return c.Images.MaxLayerBytes }),
	number("max-layer-entries", "images.maxLayerEntries", "most files and directories that an image's layers that are not here yet may have, one or all together",
		func(c *config, n int64) { c.Images.MaxLayerEntries = n }, func(c config) int64 { return c.Images.MaxLayerEntries }),
	truth("refuse-unmapped-ids", "images.refuseUnmappedIDs", "refuse an image with owners outside this user's id range, in place of giving those files to 65534",
		func(c *config) *bool { return &c.Images.RefuseUnmappedIDs }),
	text("docker-config", "images.dockerConfig", "docker config.json with registry credentials; empty looks where docker and podman do", func(c *config) *string { return &c.Images.DockerConfig }),
}

// settings are the parsed flags, from which load makes a config.
type settings struct {
	file   string
	values map[string]*string
}

func newSettings(fs *pflag.FlagSet) *settings {
	s := &settings{values: map[string]*string{}}
	fs.StringVar(&s.file, "config", "", "configuration file, YAML (CORACLE_CONFIG; $XDG_CONFIG_HOME/coracle/config.yaml where that exists)")
	for _, k := range keys {
		s.values[k.name] = fs.String(k.name, "", fmt.Sprintf("%s (%s, default %q)", k.help, k.env(), k.get(defaults())))
		if k.get(defaults()) == "false" {
			fs.Lookup(k.name).NoOptDefVal = "true"
		}
	}
	return s
}

// load resolves the configuration and the node that it names.
func (s *settings) load(fs *pflag.FlagSet) (config, rootless.Node, error) {
	c, err := s.resolve(fs)
	if err != nil {
		return c, rootless.Node{}, err
	}
	node, err := rootless.NewNode(c.Name, os.Getenv)
	return c, node, err
}

func (s *settings) resolve(flags *pflag.FlagSet) (config, error) {
	c := defaults()
	if err := s.readFile(&c); err != nil {
		return c, err
	}
	for _, k := range keys {
		value, from := "", ""
		if v, ok := os.LookupEnv(k.env()); ok {
			value, from = v, k.env()
		}
		if flags.Changed(k.name) {
			value, from = *s.values[k.name], "--"+k.name
		}
		if from == "" {
			value, from = k.get(c), k.path // what the file says is held to the same rules
		}
		if err := k.set(&c, value); err != nil {
			return c, fmt.Errorf("%s: %w", from, err)
		}
	}
	if at, err := netip.ParseAddrPort(c.Streaming.Address); err != nil || !at.Addr().IsLoopback() {
		return c, fmt.Errorf("streaming.address: %q: give a loopback address and a port, as 127.0.0.1:0; who may connect and has a URL needs no other leave",
			c.Streaming.Address)
	}
	for i, dir := range c.CopyUp {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) == "/tmp" {
			return c, fmt.Errorf("copyUp[%d]: %q: give an absolute directory other than /tmp", i, dir)
		}
	}
	for i, dir := range c.CDIDirs {
		if !filepath.IsAbs(dir) {
			return c, fmt.Errorf("cdiSpecDirs[%d]: %q: give an absolute directory", i, dir)
		}
	}
	store := c.imageStore("unused", nil)
	return c, errors.Join(validateHandlers(c.Handlers), store.Check())
}

// imageStore is the configuration of the image store at root.
func (c config) imageStore(root string, log *slog.Logger) images.Config {
	return images.Config{Root: root, Registries: c.Registries, DockerConfig: c.Images.DockerConfig, MaxLayerBytes: c.Images.MaxLayerBytes,
		MaxLayerEntries: int(c.Images.MaxLayerEntries), RefuseUnmappedIDs: c.Images.RefuseUnmappedIDs, Log: log}
}

// readFile reads the file over c. A file that was named must exist; unknown keys are refused, so that a
// misspelt one is never a setting silently lost.
func (s *settings) readFile(c *config) error {
	file, named := s.path()
	if file == "" {
		return nil
	}
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(raw, c); err != nil {
		return fmt.Errorf("read configuration %s: %s; `coracle config` lists the keys", file, inWordsOfYAML(err))
	}
	return c.anchor(file)
}

// inWordsOfYAML takes the decoder's own story, YAML by way of JSON into Go, out of its error.
func inWordsOfYAML(err error) string {
	return strings.NewReplacer("error unmarshaling JSON: ", "", "while decoding JSON: ", "", "json: ", "",
		"unknown field", "unknown key", "error converting YAML to JSON: ", "",
		"cannot unmarshal", "cannot read", "into Go struct field", "as").Replace(err.Error())
}

// anchor makes the file's relative paths absolute: they are meant from where the file is.
func (c *config) anchor(file string) error {
	dir, err := filepath.Abs(filepath.Dir(file))
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	from := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	c.Images.DockerConfig = from(c.Images.DockerConfig)
	for i, specs := range c.CDIDirs {
		c.CDIDirs[i] = from(specs)
	}
	for host, registry := range c.Registries {
		registry.CAFile = from(registry.CAFile)
		c.Registries[host] = registry
	}
	for name, handler := range c.Handlers {
		if strings.Contains(handler.Path, "/") { // else it is looked up in PATH
			handler.Path = from(handler.Path)
		}
		c.Handlers[name] = handler
	}
	return nil
}

func (s *settings) path() (file string, named bool) {
	if s.file != "" {
		return s.file, true
	}
	if v := os.Getenv("CORACLE_CONFIG"); v != "" {
		return v, true
	}
	home, err := os.UserConfigDir()
	if err != nil {
		return "", false
	}
	return filepath.Join(home, "coracle", "config.yaml"), false
}

// args renders the settings as flags, so that the daemon resolves the very same configuration.
func (s *settings) args(c config) []string {
	var out []string
	if file, named := s.path(); named {
		if abs, err := filepath.Abs(file); err == nil {
			file = abs
		}
		out = append(out, "--config="+file)
	}
	for _, k := range keys {
		out = append(out, "--"+k.name+"="+k.get(c))
	}
	return out
}

func configCommand() *cobra.Command {
	return &cobra.Command{
		Use: "config", Short: "Print every configuration key with its flag, variable, default and meaning", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			out := cmd.OutOrStdout()
			for _, k := range keys {
				fmt.Fprintf(out, "%s\n    %s\n    flag --%s, variable %s, default %q\n", k.path, k.help, k.name, k.env(), k.get(defaults()))
			}
			fmt.Fprintf(out, "copyUp\n    directories that the node may write without the host seeing it; file only, default %s\n", strings.Join(defaults().CopyUp, ", "))
			fmt.Fprintf(out, "cdiSpecDirs\n    directories of CDI specifications, read when a container asks for a CDI device; of two that describe a device the later counts; "+
				"file only, default %s\n", strings.Join(defaults().CDIDirs, ", "))
			fmt.Fprint(out, registriesHelp, handlersHelp)
		},
	}
}
