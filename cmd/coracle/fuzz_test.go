package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// FuzzConfig reads configuration files as they come: they are refused with a word on what is wrong, or they give a
// configuration that is the same once it is rendered as the daemon's flags. To run it: make fuzz RUN=FuzzConfig.
func FuzzConfig(f *testing.F) {
	for _, seed := range []string{"", "{}", "null", "[]", "limits: strict\n", "network: {mtu: 1400, podCIDR: 10.1.0.0/24, hostLoopback: true}\n",
		"network: {mtu: 1e99}\n", "images: {maxLayerBytes: 1, maxLayerEntries: 2, dockerConfig: x/y, refuseUnmappedIDs: true}\n",
		"registries: {docker.io: {mirrors: [\"http://127.0.0.1:5000\"]}, \"*\": {mirrors: [m.example]}, a: {caFile: ca.pem, username: u, password: secret}}\n",
		"handlers: {crun: {path: crun, args: [\"--x\"], sandbox: true}}\n", "copyUp: [/etc]\ncdiSpecDirs: [cdi]\n", "log: {level: debug, format: json}\n",
		"a: &a [*a]\n", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "name: \"\\0\"\n", "name: ../../x\n", "limits: !!binary aGk=\n", "limits: strict\nlimits: loose\n",
		"registries: {\"a/b\": {}}\n", "registries: {a: {mirrors: [\"https://u:secret@h\"]}}\n", "? [a]\n: b\n", strings.Repeat("[", 1000)} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	f.Setenv("XDG_CONFIG_HOME", dir)
	f.Fuzz(func(t *testing.T, raw []byte) {
		path := filepath.Join(dir, "c.yaml")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		c, args, err := parsed("--config=" + path)
		if err != nil {
			if err.Error() == "" {
				t.Error("it is refused without a word")
			}
			return
		}
		again, _, err := parsed(args...)
		if err != nil {
			t.Fatalf("rendered as %q: %v", args, err)
		}
		for _, k := range keys {
			if k.get(c) != k.get(again) {
				t.Errorf("%s: %q became %q", k.name, k.get(c), k.get(again))
			}
		}
	})
}

// parsed resolves a configuration, and renders it.
func parsed(args ...string) (config, []string, error) {
	flags := pflag.NewFlagSet("fuzz", pflag.ContinueOnError)
	s := newSettings(flags)
	if err := flags.Parse(args); err != nil {
		return config{}, nil, err
	}
	c, err := s.resolve(flags)
	return c, s.args(c), err
}
