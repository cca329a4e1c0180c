package ctr

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestAskRuntime(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		want   RuntimeFacts
		says   string
	}{
		"with features": {script: `case "$1 $2" in
			"--debug --version") echo "crun version 9"; echo "commit: x";;
			"--debug features") echo '{"ociVersionMin":"1.0.0","mountOptions":["ro","rro"],"linux":{"seccomp":{"enabled":true},"apparmor":{"enabled":false}}}';;
			*) exit 9;; esac`, want: RuntimeFacts{Version: "crun version 9", MountOptions: []string{"ro", "rro"}, Seccomp: true}},
		"without features, in the version": {script: `[ "$2" = --version ] && printf 'crun version 1\n+CAP +SECCOMP +APPARMOR +YAJL\n' || exit 1`,
			want: RuntimeFacts{Version: "crun version 1", Seccomp: true, AppArmor: true}},
		"without features": {script: `[ "$2" = --version ] && echo "old 1" || { echo "unknown command features" >&2; exit 1; }`,
			want: RuntimeFacts{Version: "old 1"}},
		"another command of that name": {script: `[ "$2" = --version ] && echo "odd 1" || echo "features: all"`, want: RuntimeFacts{Version: "odd 1"}},
		"seccomp is not mentioned":     {script: `[ "$2" = --version ] && echo "v" || echo '{"linux":{}}'`, want: RuntimeFacts{Version: "v"}},
		"fails":                        {script: `echo "no libcrun.so" >&2; exit 127`, says: "no libcrun.so"},
		"silent":                       {script: `exit 0`, says: "it says nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "runtime")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+tc.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			got, err := AskRuntime(context.Background(), path, []string{"--debug"})
			if tc.says != "" {
				if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), path) {
					t.Errorf("%v does not say %q of %s", err, tc.says, path)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("%+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
	if _, err := AskRuntime(context.Background(), "/nowhere/crun", nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no program: %v", err)
	}
}

// TestAskRuntimeLeavesNothing: a program that makes its state directory at any command, as crun does, does it elsewhere.
func TestAskRuntimeLeavesNothing(t *testing.T) {
	runtime := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", runtime)
	path := filepath.Join(t.TempDir(), "runtime")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nmkdir -p \"$XDG_RUNTIME_DIR/crun\" && echo v1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := AskRuntime(context.Background(), path, nil); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(runtime)
	if err != nil || len(left) != 0 {
		t.Errorf("left in the runtime directory: %v, %v", left, err)
	}
}
