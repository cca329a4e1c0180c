package rootless

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Problem is something about the host that forbids a node. Its text is one sentence: the cause, and the command
// that mends it.
type Problem struct {
	Check string // what was looked at, for a listing
	Cause string // what is wrong
	Fix   string // the command that mends it
}

func (p *Problem) Error() string { return p.Cause + "; to mend it, run: " + p.Fix }

// Preflight returns every Problem that can be told before a namespace is made. It reads files only.
func Preflight() []*Problem {
	var found []*Problem
	for _, check := range []func() *Problem{checkUser, checkUserNamespaces, checkIDMapTools, checkSubIDs} {
		if p := check(); p != nil {
			found = append(found, p)
		}
	}
	return found
}

func checkUser() *Problem {
	if os.Geteuid() != 0 {
		return nil
	}
	return &Problem{Check: "user", Cause: "coracle is started as root, and it exists to run without",
		Fix: "su - USER -c 'coracle up', with an ordinary user's name for USER"}
}

// checkUserNamespaces reads the three sysctls by which distributions forbid user namespaces.
func checkUserNamespaces() *Problem {
	problem := func(cause, fix string) *Problem { return &Problem{Check: "user namespaces", Cause: cause, Fix: fix} }
	if v, ok := sysctl("user/max_user_namespaces"); ok && v == 0 {
		return problem("this kernel lets users make no user namespaces (user.max_user_namespaces is 0)",
			"sudo sysctl -w user.max_user_namespaces=28633")
	}
	if v, ok := sysctl("kernel/unprivileged_userns_clone"); ok && v == 0 {
		return problem("this kernel keeps user namespaces from ordinary users (kernel.unprivileged_userns_clone is 0)",
			"sudo sysctl -w kernel.unprivileged_userns_clone=1")
	}
	if v, ok := sysctl("kernel/apparmor_restrict_unprivileged_userns"); ok && v == 1 {
		return checkAppArmor()
	}
	return nil
}

// checkAppArmor: since Ubuntu 23.10 a program needs an AppArmor profile that allows userns to get capabilities in
// a user namespace of its own; the profile is bound to the program's path.
func checkAppArmor() *Problem {
	exe, err := os.Executable()
	if err != nil {
		return nil
	}
	raw, err := os.ReadFile("/proc/self/attr/current")
	if label := strings.TrimSpace(string(raw)); err == nil && label != "unconfined" && label != "" {
		return nil // a profile is attached: whether it allows userns shows at clone(2)
	}
	file := "/etc/apparmor.d/" + strings.ReplaceAll(strings.TrimPrefix(exe, "/"), "/", ".")
	return &Problem{Check: "user namespaces",
		Cause: fmt.Sprintf("AppArmor keeps user namespaces from programs without a profile, and %s has none", exe),
		Fix: fmt.Sprintf(`printf 'abi <abi/4.0>,\ninclude <tunables/global>\n%s flags=(unconfined) {\n  userns,\n}\n' | sudo tee %s && sudo apparmor_parser -r %s`,
			exe, file, file)}
}

// checkIDMapTools: the kernel lets an unprivileged process map its own id only (user_namespaces(7)); the ids of
// /etc/subuid are mapped by newuidmap(1) and newgidmap(1), which are set-user-ID root or carry cap_setuid.
func checkIDMapTools() *Problem {
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			return &Problem{Check: "id map helpers", Cause: tool + ", which maps a user's subordinate ids, is not installed", Fix: installHint("uidmap", "shadow-utils")}
		}
		info, err := os.Stat(path)
		if err != nil {
			return &Problem{Check: "id map helpers", Cause: fmt.Sprintf("%s cannot be read: %v", path, err), Fix: "sudo chmod u+s,a+rx " + path}
		}
		xattr, _ := unix.Getxattr(path, "security.capability", nil)
		if info.Mode()&os.ModeSetuid == 0 && xattr <= 0 {
			return &Problem{Check: "id map helpers", Cause: fmt.Sprintf("%s is neither set-user-ID root nor does it carry cap_setuid", path), Fix: "sudo chmod u+s " + path}
		}
	}
	return noNewPrivs()
}

// noNewPrivs: under no_new_privs (a pod with allowPrivilegeEscalation: false) set-user-ID programs gain nothing.
func noNewPrivs() *Problem {
	if on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || on == 0 {
		return nil
	}
	return &Problem{Check: "id map helpers", Cause: "no_new_privs is set on this process, so newuidmap gains no privilege",
		Fix: "start coracle outside that container or unit, or set allowPrivilegeEscalation: true (NoNewPrivileges=no) there"}
}

// minSubIDs is what most images need: ids up to 65535.
const minSubIDs = 65536

func checkSubIDs() *Problem {
	u, err := user.Current()
	if err != nil {
		return &Problem{Check: "subordinate ids", Cause: fmt.Sprintf("uid %d has no name in the user database: %v", os.Getuid(), err),
			Fix: fmt.Sprintf("sudo useradd -u %d -m %s", os.Getuid(), "USER")}
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		if count := countSubIDs(file, u); count == 0 && !dynamicSubIDs(u, file) {
			return &Problem{Check: "subordinate ids", Cause: fmt.Sprintf("%s has no range for %s, so no id but one can be mapped", file, u.Username),
				Fix: fmt.Sprintf("sudo usermod --add-subuids %[1]s --add-subgids %[1]s %[2]s", freeRange(), u.Username)}
		}
	}
	return nil
}

// dynamicSubIDs asks getsubids(1), which knows nsswitch sources such as SSSD.
func dynamicSubIDs(u *user.User, file string) bool {
	args := []string{u.Username}
	if filepath.Base(file) == "subgid" {
		args = []string{"-g", u.Username}
	}
	out, err := exec.Command("getsubids", args...).Output()
	return err == nil && len(strings.Fields(string(out))) >= 4
}

func countSubIDs(file string, u *user.User) int {
	total := 0
	eachSubID(file, func(owner string, _, count int) {
		if owner == u.Username || owner == u.Uid {
			total += count
		}
	})
	return total
}

// freeRange is the first range of minSubIDs ids that no line of either file reaches into, as usermod(8) wants it.
func freeRange() string {
	start := 100000
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		eachSubID(file, func(_ string, first, count int) { start = max(start, first+count) })
	}
	return fmt.Sprintf("%d-%d", start, start+minSubIDs-1)
}

func eachSubID(file string, fn func(owner string, first, count int)) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(raw)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) != 3 {
			continue
		}
		first, err1 := strconv.Atoi(fields[1])
		count, err2 := strconv.Atoi(fields[2])
		if err1 == nil && err2 == nil {
			fn(fields[0], first, count)
		}
	}
}

// installHint names the package under the package manager that is there.
func installHint(debian, fedora string) string {
	if _, err := exec.LookPath("dnf"); err == nil {
		return "sudo dnf install -y " + fedora
	}
	return "sudo apt-get install -y " + debian
}

func sysctl(name string) (int, bool) {
	raw, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return 0, false
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	return v, err == nil
}

func checkWritable(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		var path *os.PathError
		if errors.As(err, &path) {
			return path.Err
		}
		return err
	}
	if !info.IsDir() {
		return syscall.ENOTDIR
	}
	return unix.Access(dir, unix.W_OK|unix.X_OK)
}

// explainStart adds the likely cause to an error of the first clone(2), whose errno says little.
func explainStart(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return &Problem{Check: "user namespaces", Cause: "the limit of user namespaces is reached: " + err.Error(), Fix: "sudo sysctl -w user.max_user_namespaces=28633"}
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if p := checkUserNamespaces(); p != nil {
			return p
		}
		return fmt.Errorf("%w (a seccomp filter or a security module of the container around this process forbids user namespaces)", err)
	}
	return err
}
