package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func resolve(t *testing.T, file string, args ...string) (config, error) {
	t.Helper()
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	if file != "" {
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	s := newSettings(flags)
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	return s.resolve(flags)
}

func TestFlagsBeatVariablesBeatFileBeatDefaults(t *testing.T) {
	c, err := resolve(t, "")
	if err != nil || c.Network.MTU != 65520 || c.Limits != "best-effort" {
		t.Fatalf("defaults: %+v, %v", c, err)
	}
	file := "network: {mtu: 1400, podCIDR: 10.1.0.0/24}\nlimits: strict\nregistries: {docker.io: {mirrors: [\"http://127.0.0.1:5000\"]}}\n"
	t.Setenv("CORACLE_NETWORK_MTU", "1500")
	t.Setenv("CORACLE_HOST_LOOPBACK", "true")
	c, err = resolve(t, file, "--limits=best-effort")
	if err != nil {
		t.Fatal(err)
	}
	if c.Network.MTU != 1500 || c.Network.PodCIDR != "10.1.0.0/24" || c.Limits != "best-effort" || !c.Network.HostLoopback {
		t.Errorf("mixed: %+v", c)
	}
	if len(c.Registries["docker.io"].Mirrors) != 1 {
		t.Errorf("registries: %+v", c.Registries)
	}
}

func TestPathsOfTheFileAreMeantFromItsDirectory(t *testing.T) {
	c, err := resolve(t, "images: {dockerConfig: auth.json}\ncdiSpecDirs: [cdi]\nregistries: {a: {caFile: ca.pem}, b: {caFile: /etc/ca.pem}}\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.CDIDirs) != 1 || c.CDIDirs[0] != filepath.Join(filepath.Dir(c.Images.DockerConfig), "cdi") {
		t.Errorf("cdiSpecDirs %q", c.CDIDirs)
	}
	if !filepath.IsAbs(c.Images.DockerConfig) || filepath.Dir(c.Images.DockerConfig) != filepath.Dir(c.Registries["a"].CAFile) {
		t.Errorf("%q, %q", c.Images.DockerConfig, c.Registries["a"].CAFile)
	}
	if got := c.Registries["b"].CAFile; got != "/etc/ca.pem" {
		t.Errorf("absolute path became %q", got)
	}
}

func TestCDISpecDirs(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	c, err := resolve(t, "")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/etc/cdi", "/var/run/cdi", filepath.Join(os.Getenv("XDG_CONFIG_HOME"), "cdi"), "/run/user/7/cdi"}
	if !slices.Equal(c.CDIDirs, want) {
		t.Errorf("default %q, want %q", c.CDIDirs, want)
	}
	if c, err = resolve(t, "cdiSpecDirs: []\n"); err != nil || len(c.CDIDirs) != 0 {
		t.Errorf("none: %q, %v", c.CDIDirs, err)
	}
}

func TestABadSettingIsNamed(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
		says string
	}{
		{"limts: strict\n", nil, `unknown key "limts"`},
		{"limits: loose\n", nil, "limits: \"loose\" is none of"},
		{"network: {mtu: -1}\n", nil, "network.mtu"},
		{"copyUp: [/tmp]\n", nil, "copyUp[0]"},
		{"cdiSpecDirs: [\"\"]\n", nil, "cdiSpecDirs[0]"},
		{"handlers: {Crun: {path: /usr/bin/crun}}\n", nil, `handlers: "Crun"`},
		{"handlers: {\"\": {path: /usr/bin/crun}}\n", nil, `handlers: ""`},
		{"handlers: {crun: {}}\n", nil, "handlers.crun.path"},
		{"handlers: {crun: {path: crun, arguments: [x]}}\n", nil, `unknown key "arguments"`},
		{"registries: {a: {mirrors: [\"ftp://b\"]}}\n", nil, "registries: a"},
		{"images: {maxLayerEntries: -1}\n", nil, "images.maxLayerEntries"},
		{"", []string{"--network-mtu=big"}, "--network-mtu"},
		{"", []string{"--host-loopback=perhaps"}, "--host-loopback"},
		{"", []string{"--config=/nonexistent/c.yaml"}, "no such file"},
	} {
		_, err := resolve(t, c.file, c.args...)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("file %q, args %v: %v; want %q in it", c.file, c.args, err, c.says)
		}
	}
}

// Keys that are wrong are quoted, values that may be passwords are not.
func TestNoErrorQuotesAPassword(t *testing.T) {
	for _, file := range []string{
		"registries: {a: {mirrors: [\"https://user:hush@mirror.example\"]}}\n", "registries: {\"*\": {username: u, password: hush}}\n",
		"registries: {a: {username: u, password: {hush: 1}, mirrors: 7}}\n", "registries: {a/b: {password: hush}}\n",
	} {
		if _, err := resolve(t, file); err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("file %q: %v", file, err)
		}
	}
}

// The daemon is started with the parent's settings as flags: nothing may be lost on the way.
func TestSettingsSurviveTheirOwnRendering(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	s := newSettings(flags)
	if err := flags.Parse([]string{"--name=a", "--network-mtu=1400", "--host-loopback", "--limits=strict", "--log-level=debug", "--pod-cidr=10.9.0.0/16"}); err != nil {
		t.Fatal(err)
	}
	first, err := s.resolve(flags)
	if err != nil {
		t.Fatal(err)
	}
	second, err := resolve(t, "", s.args(first)...)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.get(first) != k.get(second) {
			t.Errorf("%s: %q became %q", k.name, k.get(first), k.get(second))
		}
	}
}

func TestDetachIsNotPassedOn(t *testing.T) {
	got := strings.Join(withoutDetach([]string{"up", "--detach", "--name", "x", "--detach=true"}), " ")
	if got != "up --name x" {
		t.Errorf("got %q", got)
	}
}
