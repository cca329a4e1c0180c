package images

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Auth is the credentials of one pull, in the forms that the CRI has. ServerAddress, where given, is the only
// host that they are for; otherwise they are for the host in the image's name. A mirror never gets them.
type Auth struct {
	Username, Password string
	Auth               string // base64 of username:password
	IdentityToken      string // exchanged for an access token
	RegistryToken      string // a bearer token as it is
	ServerAddress      string
}

// helperTimeout bounds a credential helper: one that wants to ask somebody would wait for ever.
const helperTimeout = 30 * time.Second

// hubConfigKey is what docker login calls Docker Hub.
const hubConfigKey = "https://index.docker.io/v1/"

// config checks the credentials and brings them into one form.
func (a *Auth) config() (authn.AuthConfig, error) {
	c := authn.AuthConfig{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
	if a.Auth == "" || c.Username != "" {
		return c, nil
	}
	raw, err := decodeBase64(strings.TrimSpace(a.Auth))
	user, password, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
	if err != nil || !ok {
		return c, fmt.Errorf("%w: credentials: auth is not base64 of username:password", ErrInvalid)
	}
	c.Username, c.Password = user, password
	return c, nil
}

func decodeBase64(s string) ([]byte, error) {
	if raw, err := base64.StdEncoding.DecodeString(s); err == nil {
		return raw, nil
	}
	return base64.RawStdEncoding.DecodeString(s)
}

// serverHost is the host of a server address, in whatever form clients write it: docker.io,
// https://index.docker.io/v1/, registry:5000/path.
func serverHost(address string) string {
	address = strings.TrimPrefix(strings.TrimPrefix(address, "https://"), "http://")
	host, _, _ := strings.Cut(address, "/")
	return displayHost(host)
}

// credentials chooses what to show to an endpoint: the request's own, then the registries section, then the
// user's files. A credential helper that does not work is no reason to fail, since most images are public; what
// was wrong with it is returned as note, for the case that the registry refuses.
func (s *Store) credentials(ctx context.Context, at endpoint, auth *Auth) (c authn.AuthConfig, note string, err error) {
	if auth != nil && !at.mirror && (auth.ServerAddress == "" || serverHost(auth.ServerAddress) == displayHost(at.host)) {
		c, err = auth.config()
		if err != nil || c != (authn.AuthConfig{}) {
			return c, "", err
		}
	}
	if rc := s.cfg.registryConfig(at.host); rc.Username != "" {
		return authn.AuthConfig{Username: rc.Username, Password: rc.Password}, "", nil
	}
	for _, file := range s.cfg.credentialFiles() {
		c, err := lookUpFile(ctx, file, at)
		if errors.Is(err, fs.ErrNotExist) && errors.As(err, new(*fs.PathError)) {
			continue
		}
		if err != nil {
			note = "credentials from " + file + ": " + shorten(err.Error())
			s.log.Warn("credentials cannot be read", "file", file, "registry", at.host, "error", shorten(err.Error()))
			continue
		}
		if c != (authn.AuthConfig{}) {
			return c, "", nil
		}
	}
	return authn.AuthConfig{}, note, nil
}

// credentialFiles lists where docker and podman keep logins.
func (c *Config) credentialFiles() []string {
	if c.DockerConfig != "" {
		return []string{c.DockerConfig}
	}
	var files []string
	home, _ := os.UserHomeDir() // "" where there is none: then those files are not there either
	add := func(dir string, elem ...string) {
		if dir != "" {
			files = append(files, filepath.Join(append([]string{dir}, elem...)...))
		}
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		add(dir, "config.json")
	} else {
		add(home, ".docker", "config.json")
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"))
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		add(dir, "containers", "auth.json")
	} else {
		add(home, ".config", "containers", "auth.json")
	}
	return files
}

// credentialFile is the part of config.json and auth.json that says who one is.
type credentialFile struct {
	Auths       map[string]authn.AuthConfig `json:"auths"`
	CredHelpers map[string]string           `json:"credHelpers"`
	CredsStore  string                      `json:"credsStore"`
}

// lookUpFile finds the credentials for an endpoint in one file. Keys are hosts, or, in auth.json, hosts with the
// beginning of a repository's path: the longest that fits counts.
func lookUpFile(ctx context.Context, path string, at endpoint) (authn.AuthConfig, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return authn.AuthConfig{}, fmt.Errorf("read credentials: %w", err)
	}
	var f credentialFile
	if err := json.Unmarshal(raw, &f); err != nil {
		// The decoder quotes its input, and that holds passwords.
		return authn.AuthConfig{}, errors.New("it is not a JSON file of credentials")
	}
	host := displayHost(at.host)
	for key, helper := range f.CredHelpers {
		if serverHost(key) == host {
			return askHelper(ctx, helper, key)
		}
	}
	for prefix := host + "/" + at.path; ; {
		for key, c := range f.Auths {
			if keyFits(key, prefix) && c != (authn.AuthConfig{}) {
				return c, nil
			}
		}
		cut := strings.LastIndexByte(prefix, '/')
		if cut < 0 {
			break
		}
		prefix = prefix[:cut]
	}
	if f.CredsStore == "" {
		return authn.AuthConfig{}, nil
	}
	if host == dockerHub {
		host = hubConfigKey
	}
	return askHelper(ctx, f.CredsStore, host)
}

// keyFits compares a key of auths with a host, or with a host and the beginning of a path. docker login wrote
// hosts as URLs with the path of an API version.
func keyFits(key, prefix string) bool {
	if strings.Contains(prefix, "/") {
		return strings.TrimSuffix(key, "/") == prefix
	}
	_, path, _ := strings.Cut(strings.TrimSuffix(key, "/"), "/")
	plain := path == "" || path == "v1" || path == "v2" || strings.Contains(key, "://")
	return plain && serverHost(key) == prefix
}

// askHelper runs docker-credential-NAME get, as docker-credential-helpers defines it.
func askHelper(ctx context.Context, helper, server string) (authn.AuthConfig, error) {
	if strings.ContainsRune(helper, '/') {
		return authn.AuthConfig{}, fmt.Errorf("credential helper %q is a path", helper)
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	program := "docker-credential-" + helper
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(server)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		// The protocol reports on stdout; "not found" in it means that there is no login.
		if text := strings.ToLower(out.String()); strings.Contains(text, "not found") {
			return authn.AuthConfig{}, nil
		}
		return authn.AuthConfig{}, fmt.Errorf("run %s: %w", program, err)
	}
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		return authn.AuthConfig{}, fmt.Errorf("run %s: its answer is not JSON", program)
	}
	if answer.Username == "<token>" {
		return authn.AuthConfig{IdentityToken: answer.Secret}, nil
	}
	return authn.AuthConfig{Username: answer.Username, Password: answer.Secret}, nil
}
