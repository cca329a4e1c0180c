package keeper_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestAStateThatCannotBeReadGoesBackWhole: one of another shape, though of the same version, is for the program that left
// it, which a shell is here. It gets all of it, also what the program in between does not know, and every descriptor.
func TestAStateThatCannotBeReadGoesBackWhole(t *testing.T) {
	ends := map[string]string{ // what says that it ends here
		`{"version":1,"program":4,"path":"/bin/sh","containers":"none","refused":"once before"}`: "neither the new keeper (once before) nor the one of before",
		`{"version":1,"program":4`:                      "find the way back: unexpected end",
		`{"version":1,"program":4,"containers":"none"}`: "find the way back: there is none",
	}
	for state, want := range ends {
		if out := giveState(t, state); !strings.Contains(out, want) || strings.Contains(out, "refused\":") {
			t.Errorf("%s: it is not told to end, by %q: %s", state, want, out)
		}
	}
	state := `{"version":1,"from":"x","program":4,"path":"/bin/sh","listener":5,"containers":"none","seq":18446744073709551615,"more":{"a":[1]}}`
	out := giveState(t, state)
	for _, part := range []string{`"seq":18446744073709551615`, `"more":{"a":[1]}`, `"refused":"the new keeper could not take over: `, `the sixth is open`} {
		if !strings.Contains(out, part) {
			t.Errorf("%s: %q is missing in %s", state, part, out)
		}
	}
}

// giveState has a keeper receive a state whose program, descriptor 4, is a shell that prints what it gets.
func giveState(t *testing.T, state string) string {
	t.Helper()
	given, err := os.Create(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer given.Close()
	if _, err := given.WriteString(state); err != nil {
		t.Fatal(err)
	}
	shell, err := os.Open("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	defer shell.Close()
	cmd := exec.Command(self(t), "-c", `cat /proc/self/fd/$_CORACLE_KEEPER_HANDOVER; [ -e /proc/self/fd/5 ] && echo the sixth is open`)
	cmd.Env = append(os.Environ(), roleEnv+"=receiver", "_CORACLE_KEEPER_HANDOVER=3")
	cmd.ExtraFiles = []*os.File{given, shell, shell}
	out, _ := cmd.CombinedOutput() // what it prints tells how it ended
	return string(out)
}
