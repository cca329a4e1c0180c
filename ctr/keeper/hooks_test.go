package keeper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/ctr/wire"
)

// hook is a shell script as a hook.
func hook(script string) specs.Hook {
	timeout := 20
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-ec", script}, Env: []string{"PATH=/usr/bin:/bin"}, Timeout: &timeout}
}

// TestHooksOfACreationAreRun: with the state that the OCI promises, whose bundle has the configuration, and each where
// it belongs: createContainer in the container's mounts, before they are its root; startContainer in the container.
func TestHooksOfACreationAreRun(t *testing.T) {
	n := newNode(t)
	out := filepath.Join(n.dir, "hooks")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	s := sh("ls /tmp")
	keep := func(name string) specs.Hook {
		return hook(fmt.Sprintf(`cat >%[1]s/%[2]s; cp "$(sed 's/.*"bundle":"\([^"]*\)".*/\1/' %[1]s/%[2]s)/config.json" %[1]s/%[2]s.config`, out, name))
	}
	s.Hooks = &specs.Hooks{
		Prestart:        []specs.Hook{keep("prestart")},
		CreateRuntime:   []specs.Hook{keep("createRuntime")},
		CreateContainer: []specs.Hook{keep("createContainer"), hook(fmt.Sprintf("touch %s/tmp/by-createContainer", s.Root.Path))},
		StartContainer:  []specs.Hook{hook("touch /tmp/by-startContainer")},
	}
	before := mountCount(t)
	if state := n.run("c1", s); state.ExitCode != 0 {
		t.Fatalf("%+v", state)
	}
	if got := strings.Join(n.lines("c1"), ";"); got != "stdout F by-createContainer;stdout F by-startContainer" {
		t.Errorf("/tmp of the container: %s", got)
	}
	if exists(filepath.Join(s.Root.Path, "tmp/by-createContainer")) || mountCount(t) != before {
		t.Error("what the hook did in the container's mounts is the node's too")
	}
	for _, name := range []string{"prestart", "createRuntime", "createContainer"} {
		var state specs.State
		var config specs.Spec
		for file, into := range map[string]any{name: &state, name + ".config": &config} {
			raw, err := os.ReadFile(filepath.Join(out, file))
			if err == nil {
				err = json.Unmarshal(raw, into)
			}
			if err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
		if state.ID != "c1" || state.Status != specs.StateCreating || state.Pid == 0 || config.Root == nil || config.Root.Path != s.Root.Path {
			t.Errorf("%s: state %+v, configuration %+v", name, state, config)
		}
	}
	n.delete("c1")
	if left, _ := filepath.Glob(n.dir + "/keeper/lc/*"); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

func TestAHookThatFailsEndsTheCreation(t *testing.T) {
	n := newNode(t)
	second := 1
	slow := hook("exec sleep 100")
	slow.Timeout = &second
	for name, tc := range map[string]struct {
		hooks specs.Hooks
		want  string
	}{
		"createRuntime":   {specs.Hooks{CreateRuntime: []specs.Hook{hook("echo no luck >&2; exit 3")}}, "no luck"},
		"createContainer": {specs.Hooks{CreateContainer: []specs.Hook{hook("echo no luck >&2; exit 3")}}, "no luck"},
		"no program":      {specs.Hooks{CreateContainer: []specs.Hook{{Path: "/no/hook"}}}, "/no/hook"},
		"slow":            {specs.Hooks{CreateRuntime: []specs.Hook{slow}}, "timeout"},
		"poststart":       {specs.Hooks{Poststart: []specs.Hook{hook("true")}}, "poststart"},
		"poststop":        {specs.Hooks{Poststop: []specs.Hook{hook("true")}}, "poststop"},
	} {
		s := sh("true")
		s.Hooks = &tc.hooks
		_, err := n.Create(context.Background(), ctr.CreateRequest{ID: "c1", Spec: s})
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.HasPrefix(name, "post") && !errors.Is(err, wire.ErrBadRequest) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
		if left, _ := filepath.Glob(n.dir + "/keeper/lc/*"); len(left) != 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
}

// TestHooksLoseNoStatusToTheReaper: while orphans end without pause.
func TestHooksLoseNoStatusToTheReaper(t *testing.T) {
	n := newNode(t)
	n.create("orphans", pidNamespace(sh(`echo ready; while :; do (true &); (sleep 0.01 &); done`), ""))
	n.start("orphans")
	eventually(t, "it runs", func() bool { return len(n.lines("orphans")) == 1 })
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 4 {
				id := fmt.Sprintf("c%d-%d", i, j)
				s := sh("exit 9")
				// What a hook leaves behind comes to the keeper, too.
				s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{hook("(true &) ; true"), hook("exit 0")}, CreateContainer: []specs.Hook{hook("(true &); true")}}
				if state := n.run(id, s); state.ExitCode != 9 {
					t.Errorf("%s: %+v", id, state)
				}
				if err := n.Delete(context.Background(), id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	n.delete("orphans")
	eventually(t, "no zombie is left", func() bool { return strings.Count(processes(), "\n") == 0 })
}
