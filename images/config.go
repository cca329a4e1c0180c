package images

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"
)

// Config says where the store is and how registries are reached.
type Config struct {
	// Root is the store's directory. It is made where it is missing; everything in it belongs to the store.
	Root string
	// Registries is keyed by registry host as written in image names ("docker.io", "localhost:5000"), or by the
	// host of a mirror. The key "*" names the mirrors of every registry without a section of its own.
	Registries map[string]RegistryConfig
	// DockerConfig is the path of a docker config.json with credentials. "" looks where docker and podman do:
	// $DOCKER_CONFIG, ~/.docker, $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR/containers, ~/.config/containers.
	// The files are read for each pull, so that a login counts at once.
	DockerConfig string
	// MaxLayerBytes bounds what those layers of one image that are not here yet may unpack to together, against
	// decompression bombs. 0 is DefaultMaxLayerBytes.
	MaxLayerBytes int64
	// MaxLayerEntries bounds how many files and directories they may have. 0 is DefaultMaxLayerEntries.
	MaxLayerEntries int
	// RefuseUnmappedIDs makes an image with owners outside this user's id range an error. Otherwise such files
	// belong to the overflow id 65534 in the containers, and the image's verbose info says so.
	RefuseUnmappedIDs bool
	// Log receives what an operator should know. Credentials are never in it. nil is slog.Default().
	Log *slog.Logger

	waits waits // shorter in tests
}

// everyRegistry is the key of the section for registries that have none of their own.
const everyRegistry = "*"

// DefaultMaxLayerBytes lets today's model images in, of several layers of tens of GiB, and is smaller than many disks.
const DefaultMaxLayerBytes = 256 << 30

// DefaultMaxLayerEntries is ten times what the largest layers of today have, and a fraction of a disk's inodes.
const DefaultMaxLayerEntries = 4 << 20

// RegistryConfig is how one registry host is reached.
type RegistryConfig struct {
	// Mirrors are asked in this order before the registry itself: "host[:port][/prefix]", or the same after
	// http:// or https://. Options and credentials of a mirror stand under its own host.
	Mirrors []string `json:"mirrors,omitempty"`
	// Insecure allows plain http, and, without a CAFile, https with a certificate that cannot be verified: to this host and
	// port, not to where it leads. Loopback hosts are reached so without being told.
	Insecure bool `json:"insecure,omitempty"`
	// CAFile is a PEM file of certificates trusted beside the system's, for the host and for what it leads to.
	CAFile string `json:"caFile,omitempty"`
	// Username and Password are used where the CRI request brings no credentials for this host.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

// LogValue keeps the password out of logs.
func (c RegistryConfig) LogValue() slog.Value {
	return slog.GroupValue(slog.Any("mirrors", c.Mirrors), slog.Bool("insecure", c.Insecure),
		slog.String("caFile", c.CAFile), slog.Bool("credentials", c.Username != ""))
}

// String keeps the password out of formatted text.
func (c RegistryConfig) String() string { return c.LogValue().String() }

// MarshalJSON keeps the password out of what is printed; a configuration file is only read.
func (c RegistryConfig) MarshalJSON() ([]byte, error) {
	type plain RegistryConfig
	c.Password = ""
	return json.Marshal(plain(c))
}

// registryConfig returns the section for host, under any of the names of Docker Hub. It is never the one for every
// registry: credentials and authorities are for hosts that are named.
func (c *Config) registryConfig(host string) RegistryConfig {
	rc, _ := c.lookUp(host)
	return rc
}

func (c *Config) lookUp(host string) (rc RegistryConfig, ok bool) {
	if rc, ok := c.Registries[host]; ok {
		return rc, true
	}
	for key, rc := range c.Registries {
		if displayHost(key) == displayHost(host) {
			return rc, true
		}
	}
	return RegistryConfig{}, false
}

// mirrors are those of the host's own section, even where that has none, else those for every registry.
func (c *Config) mirrors(host string) []string {
	rc, ok := c.lookUp(host)
	if !ok {
		rc = c.Registries[everyRegistry]
	}
	return rc.Mirrors
}

// Check tells what is wrong with a configuration, without a look at the disk.
func (c *Config) Check() error {
	if c.Root == "" {
		return fmt.Errorf("%w: images: no root directory", ErrInvalid)
	}
	if c.MaxLayerBytes < 0 {
		return fmt.Errorf("%w: images: max layer bytes %d is negative", ErrInvalid, c.MaxLayerBytes)
	}
	if c.MaxLayerEntries < 0 {
		return fmt.Errorf("%w: images: max layer entries %d is negative", ErrInvalid, c.MaxLayerEntries)
	}
	for _, host := range slices.Sorted(maps.Keys(c.Registries)) {
		if strings.ContainsAny(host, "/ ") {
			return fmt.Errorf("%w: registries: key %q: want a host with an optional port", ErrInvalid, host)
		}
		rc := c.Registries[host]
		if host == everyRegistry && (rc.Insecure || rc.CAFile != "" || rc.Username != "" || rc.Password != "") {
			return fmt.Errorf("%w: registries: key %q takes mirrors alone; give insecure, caFile, username and password to a host", ErrInvalid, host)
		}
		for _, m := range rc.Mirrors {
			if _, err := parseMirror(m); err != nil {
				return fmt.Errorf("registries: %s: %w", host, err)
			}
		}
	}
	return nil
}

// Image is what the store knows of one image. It is a copy.
type Image struct {
	ID          string   // "sha256:…", the digest of the image's configuration
	RepoTags    []string // canonical names by tag, sorted
	RepoDigests []string // canonical names by manifest or index digest, sorted
	Size        uint64   // bytes that its layers take on disk, shared ones included
	Config      ImageConfig
}

// ImageConfig is the part of an image's configuration that containers start from.
type ImageConfig struct {
	Entrypoint, Cmd, Env         []string
	WorkingDir, User, StopSignal string
	Volumes                      map[string]struct{}
	Labels                       map[string]string
}

// waits is how long the store waits for what.
type waits struct {
	dial       time.Duration // for a connection, and for TLS on it
	header     time.Duration // for the header of an answer
	stall      time.Duration // an answer that brings less than least bytes in so much waiting is given up, and a layer resumed
	least      int           // bytes of a layer in each stall; of a document a documentShare of it
	patience   time.Duration // what waiting may take in all, see patience
	backoff    time.Duration // before the first retry; doubles
	maxBackoff time.Duration
	retryAfter time.Duration // the longest Retry-After that is waited for
	settle     time.Duration // after the last layer, before layers are written out
	resync     time.Duration // after layers could not be written out
}

// defaultWaits has a least rate of 1.1 KB/s. Three layers that come at once over a mobile line of the worst kind, GPRS at
// some 40 kbit/s, get 1.7 each; and where each gets less, it is what they get together that counts. A server that trickles
// is given up, and whoever waits behind it waits for no more than that. A document is not resumed, and pays for nothing before
// it is whole: it comes at any rate over 17 bytes a second, a usual one of 10 KB at 20 bytes a second.
var defaultWaits = waits{dial: 30 * time.Second, header: time.Minute, stall: time.Minute, least: 64 << 10, patience: 10 * time.Minute,
	backoff: 500 * time.Millisecond, maxBackoff: 15 * time.Second, retryAfter: time.Minute, settle: 2 * time.Second, resync: time.Minute}
