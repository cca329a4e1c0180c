//go:build cgo && seccomp

package filters_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/opencontainers/runc/libcontainer/configs"
	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/ctr/keeper/filters"
)

// roleEnv makes this binary, executed again, what compiles (export) or keeps (record) the profile on standard input.
const roleEnv = "CORACLE_TEST_FILTERS"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "record":
		exitOn(filters.Record(os.Stdin))
	case "export":
		filters.Use()
		exitOn(export())
	}
	os.Exit(m.Run())
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// export makes the calls that libcontainer makes for a small profile of unconditional and conditional rules, and writes
// what libseccomp answers. libcontainer itself would load it.
func export() error {
	var c configs.Seccomp
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return err
	}
	f, err := libseccomp.NewFilter(action(c.DefaultAction))
	if err != nil {
		return err
	}
	for _, name := range c.Architectures {
		arch, err := libseccomp.GetArchFromString(name)
		if err != nil {
			return err
		}
		if err := f.AddArch(arch); err != nil {
			return err
		}
	}
	if err := f.SetNoNewPrivsBit(false); err != nil {
		return err
	}
	for _, call := range c.Syscalls {
		number, err := libseccomp.GetSyscallFromName(call.Name)
		if err != nil {
			return err
		}
		var conditions []libseccomp.ScmpCondition
		for _, arg := range call.Args {
			condition, err := libseccomp.MakeCondition(arg.Index, libseccomp.CompareEqual, arg.Value)
			if err != nil {
				return err
			}
			conditions = append(conditions, condition)
		}
		if len(conditions) == 0 {
			err = f.AddRule(number, action(call.Action))
		} else {
			err = f.AddRuleConditional(number, action(call.Action), conditions)
		}
		if err != nil {
			return err
		}
	}
	return f.ExportBPF(os.Stdout)
}

func action(a configs.Action) libseccomp.ScmpAction {
	if a == configs.Allow {
		return libseccomp.ActAllow
	}
	return libseccomp.ActErrno.SetReturnCode(int16(unix.EPERM))
}

func profile() *configs.Seccomp {
	allow := func(name string, args ...*configs.Arg) *configs.Syscall {
		return &configs.Syscall{Name: name, Action: configs.Allow, Args: args}
	}
	return &configs.Seccomp{DefaultAction: configs.Errno, Architectures: []string{"amd64", "x86", "x32"}, Syscalls: []*configs.Syscall{
		allow("read"), allow("write"), allow("clone", &configs.Arg{Index: 0, Value: 17, Op: configs.EqualTo}), allow("exit_group")}}
}

// run executes this binary in a role, with a file at filters.Fd where there is one.
func run(t *testing.T, role string, p *configs.Seccomp, file *os.File) []byte {
	t.Helper()
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stdin = bytes.NewReader(raw)
	var said bytes.Buffer
	cmd.Stderr = &said
	if file != nil {
		cmd.ExtraFiles = []*os.File{file}
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", role, err, said.String())
	}
	return out
}

// record keeps the filter of a profile, and returns the bytes of the record.
func record(t *testing.T, p *configs.Seccomp) []byte {
	t.Helper()
	file := memfd(t)
	run(t, "record", p, file)
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func memfd(t *testing.T) *os.File {
	t.Helper()
	file, err := filters.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return file
}

func sealed(t *testing.T, raw []byte) *os.File {
	t.Helper()
	file := memfd(t)
	if _, err := file.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := filters.Seal(file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestTheProgramKeptIsTheOneThatWouldBeCompiled(t *testing.T) {
	raw, compiled := record(t, profile()), run(t, "export", profile(), nil)
	if len(compiled) == 0 || !bytes.HasSuffix(raw, compiled) {
		t.Fatalf("a record of %d bytes does not end with the program of %d", len(raw), len(compiled))
	}
}

// TestOnlyTheSameCallsGetTheKeptProgram: the kept one is marked, so that it is told from one compiled anew.
func TestOnlyTheSameCallsGetTheKeptProgram(t *testing.T) {
	raw := record(t, profile())
	marked := slices.Clone(raw)
	marked[len(marked)-1] ^= 0xff
	kept := sealed(t, marked)
	if got := run(t, "export", profile(), kept); len(got) == 0 || !bytes.HasSuffix(marked, got) {
		t.Error("the same profile was compiled anew")
	}
	for name, change := range map[string]func(*configs.Seccomp){
		"a rule less": func(p *configs.Seccomp) { p.Syscalls = p.Syscalls[:3] },
		"a rule more": func(p *configs.Seccomp) {
			p.Syscalls = append(p.Syscalls, &configs.Syscall{Name: "openat", Action: configs.Allow})
		},
		"another order":    func(p *configs.Seccomp) { slices.Reverse(p.Syscalls) },
		"another argument": func(p *configs.Seccomp) { p.Syscalls[2].Args[0].Value = 18 },
		"no architecture":  func(p *configs.Seccomp) { p.Architectures = p.Architectures[:1] },
		"another action": func(p *configs.Seccomp) {
			p.DefaultAction = configs.Allow
			p.Syscalls[0].Action = configs.Errno
			p.Syscalls = p.Syscalls[:1]
		},
	} {
		p := profile()
		change(p)
		if got := run(t, "export", p, kept); !bytes.Equal(got, run(t, "export", p, nil)) {
			t.Errorf("%s: with a filter kept it is another program than without", name)
		}
	}
}

func TestWhatIsNoRecordIsNotUsed(t *testing.T) {
	raw, compiled := record(t, profile()), run(t, "export", profile(), nil)
	for name, bad := range map[string][]byte{"its head is missing": append(make([]byte, 16), raw[16:]...),
		"it is cut": raw[:len(raw)-8], "it is short": raw[:4]} {
		if got := run(t, "export", profile(), sealed(t, bad)); !bytes.Equal(got, compiled) {
			t.Errorf("%s: another program", name)
		}
	}
	open := memfd(t)
	marked := slices.Clone(raw)
	marked[len(marked)-1] ^= 0xff
	if _, err := open.Write(marked); err != nil {
		t.Fatal(err)
	}
	if got := run(t, "export", profile(), open); !bytes.Equal(got, compiled) {
		t.Error("a record that could still be changed was used")
	}
}

func TestAnEmptyRecordIsNotSealed(t *testing.T) {
	if err := filters.Seal(memfd(t)); err == nil {
		t.Error("sealed")
	}
}
