package cgroupv2

import (
	"fmt"
	"slices"
	"strings"
)

// wanted are the controllers behind the CRI's resource fields.
var wanted = []string{"cpu", "cpuset", "io", "memory", "pids"}

// Delegation is the subtree that this user may use, as Find saw it.
type Delegation struct {
	// Path is the absolute directory that takes the node's cgroup; "" where there is none.
	Path string
	// Controllers can be enabled for the node. Without any, counting CPU time, pressure, freezing and killing
	// still work; limits do not.
	Controllers []string
	// Sentence says what was found.
	Sentence string
	// Hint says what to run to get the rest; "" where nothing is missing.
	Hint string
	// Attempts tells of each place that was tried, in order, and what came of it.
	Attempts []string
	// Scope: the user's systemd can make a scope that gives this; it does when Obtain is called, and Path is "" before.
	Scope bool
}

// Find looks, from outside the namespaces, for the cgroup v2 subtree delegated to this user: in the cgroup of
// this process and in those above it; then, where that does not give everything, whether the systemd of the user's
// session can make a scope that gives more. The boundary of a delegation is where the directory, cgroup.procs and
// cgroup.subtree_control are writable (the kernel's cgroup-v2.rst, "Delegation"). It changes nothing. An error
// means that /proc could not be read; that nothing is delegated is an answer, not an error.
func Find() (Delegation, error) { return thisHost().find() }

func (h host) find() (Delegation, error) {
	pl, err := h.locate()
	if err != nil {
		return Delegation{}, fmt.Errorf("find cgroup: %w", err)
	}
	if sentence, hint := h.unreachable(pl); sentence != "" {
		return Delegation{Sentence: sentence, Hint: hint, Attempts: []string{"cgroup v2 tree: " + sentence}}, nil
	}
	own, err := h.findOwn(pl)
	if err != nil {
		return Delegation{}, fmt.Errorf("find cgroup: %w", err)
	}
	own.Attempts = []string{"subtree of this process: " + own.Sentence}
	if len(lacking(own.Controllers)) == 0 {
		own.Attempts = append(own.Attempts, "scope of the user's systemd: not asked for, since nothing is missing")
		return own, nil
	}
	group, controllers, err := h.offer(pl)
	switch {
	case err != nil:
		own.Attempts = append(own.Attempts, "scope of the user's systemd: "+oneLine(err))
		return own, nil
	case own.Path != "" && len(lacking(controllers)) >= len(lacking(own.Controllers)):
		own.Attempts = append(own.Attempts, fmt.Sprintf("scope of the user's systemd: gives no more (%s)", words(controllers)))
		return own, nil
	}
	sentence := fmt.Sprintf("the user's systemd can make a scope below %s with controllers %s", pl.dir(group), words(controllers))
	return Delegation{Controllers: controllers, Sentence: sentence, Scope: true,
		Hint:     joinHints(h.askForControllers(pl, group, lacking(controllers)), h.linger()),
		Attempts: append(own.Attempts, "scope of the user's systemd: "+sentence)}, nil
}

// findOwn looks at the cgroup of this process and those above it.
func (h host) findOwn(pl place) (Delegation, error) {
	var best spot
	for _, p := range candidates(pl.own) {
		s, ok, err := h.look(pl, p)
		if err != nil {
			return Delegation{}, err
		}
		// The one that gives most controllers; of equals the nearest, which has the least to do with others.
		if ok && (best.path == "" || len(s.usable()) > len(best.usable())) {
			best = s
		}
	}
	if best.path == "" {
		return Delegation{
			Sentence: fmt.Sprintf("uid %d may not write the cgroup of this process, %s: no cgroups", h.uid, pl.dir(pl.own)),
			Hint:     h.askForSubtree(pl),
		}, nil
	}
	return h.describe(pl, best), nil
}

// lacking lists what the CRI's resources need and controllers has not.
func lacking(controllers []string) []string {
	return slices.DeleteFunc(slices.Clone(wanted), func(c string) bool { return slices.Contains(controllers, c) })
}

// words names controllers for people.
func words(controllers []string) string {
	if len(controllers) == 0 {
		return "none"
	}
	return strings.Join(controllers, " ")
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// unreachable says why no cgroup v2 tree can be used at all; "" where one may be.
func (h host) unreachable(pl place) (sentence, hint string) {
	const boot = "start the machine with cgroup v2: kernel parameter systemd.unified_cgroup_hierarchy=1 (without systemd: cgroup_no_v1=all), and mount cgroup2 on /sys/fs/cgroup"
	const private = "start this container with a cgroup namespace of its own and a writable /sys/fs/cgroup (docker and podman: --cgroupns=private, and -v /sys/fs/cgroup:/sys/fs/cgroup:rw or --privileged)"
	switch {
	case !pl.known:
		return "this kernel has no cgroup v2 hierarchy: no cgroups", boot
	case !pl.found && len(pl.v1) > 0:
		return "only cgroup v1 is mounted: no cgroups", boot
	case !pl.found:
		return "no cgroup2 file system is mounted: no cgroups", "sudo mount -t cgroup2 none /sys/fs/cgroup"
	case pl.mount.readOnly:
		return fmt.Sprintf("cgroup v2 is mounted read-only on %s: no cgroups", pl.mount.point), private
	case pl.mount.root != "/" || pl.own == "/.." || strings.HasPrefix(pl.own, "/../"):
		// The mount shows another part of the hierarchy than the paths in /proc/self/cgroup are relative to.
		return fmt.Sprintf("the cgroup2 mount %s does not show the cgroup of this process: no cgroups", pl.mount.point), private
	}
	return "", ""
}

// spot is a cgroup that we may use.
type spot struct {
	path        string // relative to the hierarchy's root
	strangers   []int  // processes in it that are not ours: they are left alone
	controllers []string
	enabled     []string // those already enabled for its children
}

// usable lists the controllers that a child gets or can be given. Where strangers are none can be added; some are
// there at most in the root, which is free of the rule against internal processes.
func (s spot) usable() []string {
	if len(s.strangers) > 0 {
		return s.enabled
	}
	return s.controllers
}

// look tells whether the cgroup p can be used.
func (h host) look(pl place, p string) (spot, bool, error) {
	g := h.group(pl.dir(p))
	for _, file := range []group{g, g.join(procsFile), g.join(subtreeFile)} {
		if h.writable(string(file)) != nil {
			return spot{}, false, nil
		}
	}
	// The root has no cgroup.type and is always a domain. Threaded cgroups cannot hold containers.
	if kind, err := g.read("cgroup.type"); err == nil && kind != "domain" {
		return spot{}, false, nil
	}
	pids, err := g.procs()
	if err != nil {
		return spot{}, false, err
	}
	s := spot{path: p}
	for _, pid := range pids {
		if pid != h.pid && (pid != h.starter || pid == 0) {
			s.strangers = append(s.strangers, pid)
		}
	}
	if s.controllers, err = g.available(); err != nil {
		return spot{}, false, err
	}
	s.enabled, err = g.inForce()
	return s, err == nil, err
}

// describe turns the chosen cgroup into what a user reads.
func (h host) describe(pl place, s spot) Delegation {
	d := Delegation{Path: pl.dir(s.path), Controllers: s.usable()}
	d.Sentence = fmt.Sprintf("cgroup v2 subtree %s with controllers %s", d.Path, strings.Join(d.Controllers, " "))
	if len(d.Controllers) == 0 {
		d.Sentence = fmt.Sprintf("cgroup v2 subtree %s without controllers: counting, freezing and killing work, limits do not", d.Path)
	}
	var hints []string
	if len(s.controllers) > len(d.Controllers) {
		hints = append(hints, fmt.Sprintf("%s holds other processes (%s), and the kernel enables controllers (here %s) only where there are none: %s",
			d.Path, pidList(s.strangers), strings.Join(s.controllers, " "), h.emptyIt(d.Path, s.path)))
	}
	if hint := h.askForControllers(pl, s.path, lacking(s.controllers)); hint != "" {
		hints = append(hints, hint)
	}
	d.Hint = strings.Join(hints, "; ")
	return d
}

func pidList(pids []int) string {
	const shown = 3
	words := make([]string, 0, shown)
	for _, pid := range pids[:min(len(pids), shown)] {
		words = append(words, fmt.Sprint(pid))
	}
	if len(pids) > shown {
		words = append(words, "…")
	}
	if len(pids) == 1 {
		return "pid " + words[0]
	}
	return "pids " + strings.Join(words, ", ")
}

// underSystemd tells whether systemd runs this machine (sd_booted(3)).
func (h host) underSystemd() bool { return h.group("/run/systemd/system").exists() }

// emptyIt says how to get the processes of others out of a subtree that is ours.
func (h host) emptyIt(dir, rel string) string {
	if h.underSystemd() && slices.ContainsFunc(strings.Split(rel, "/"), isUnit) {
		return h.askSystemd()
	}
	return fmt.Sprintf("put them into a leaf with `mkdir -p %[1]s/shell && for p in $(cat %[1]s/cgroup.procs); do echo $p > %[1]s/shell/cgroup.procs; done 2>/dev/null` and start the node again", dir)
}

// askSystemd says how to get a subtree from systemd where the user's own was not to be had, or gave no more: have it
// started, so that the next start asks it, or have root start the node in a unit that delegates.
func (h host) askSystemd() string {
	user := h.user
	if user == "" {
		user = fmt.Sprint(h.uid)
	}
	asRoot := fmt.Sprintf("sudo systemd-run --uid=%s -p Delegate=yes -E HOME=\"$HOME\" -E PATH=\"$PATH\" -E XDG_RUNTIME_DIR=\"$XDG_RUNTIME_DIR\" -- \"$(command -v coracle)\" up", user)
	if h.group(fmt.Sprintf("/run/user/%d/systemd", h.uid)).exists() {
		return fmt.Sprintf("give the user's systemd a bus (Debian: `sudo apt-get install dbus-user-session`, and log in again), or have root start the node in a unit that delegates: `%s`", asRoot)
	}
	return fmt.Sprintf("start a systemd of this user's with `sudo loginctl enable-linger %s` and start the node again, or have root start the node in a unit that delegates: `%s`", user, asRoot)
}

// askForSubtree says how to get a subtree where nothing is delegated.
func (h host) askForSubtree(pl place) string {
	if h.underSystemd() {
		return h.askSystemd()
	}
	// The shell goes into a leaf, so that its parent has no process and can enable controllers.
	dir := pl.dir(fmt.Sprintf("/coracle-%d", h.uid))
	return fmt.Sprintf("have root hand one over: `sudo sh -c \"mkdir -p %[1]s/shell && for d in %[1]s %[1]s/shell; do chown %[2]d \\$d \\$d/cgroup.procs \\$d/cgroup.subtree_control \\$d/cgroup.threads; done; echo $$ > %[1]s/shell/cgroup.procs\"` and start the node from this shell", dir, h.uid)
}

// askForControllers says how to get the missing ones; "" where none is missing or nothing would help.
func (h host) askForControllers(pl place, rel string, missing []string) string {
	taken := slices.DeleteFunc(slices.Clone(missing), func(c string) bool { return !slices.Contains(pl.v1, c) })
	if len(taken) > 0 {
		return fmt.Sprintf("%s: held by cgroup v1 on this machine; start it with kernel parameter systemd.unified_cgroup_hierarchy=1 (without systemd: cgroup_no_v1=all)", strings.Join(taken, " "))
	}
	offered, err := h.group(pl.mount.point).available()
	if err != nil {
		return ""
	}
	missing = slices.DeleteFunc(slices.Clone(missing), func(c string) bool { return !slices.Contains(offered, c) })
	switch {
	case len(missing) == 0:
		return ""
	case h.underSystemd():
		return fmt.Sprintf("%s: not delegated by systemd; run `sudo mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nDelegate=%s\\n' | sudo tee /etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload` and %s",
			strings.Join(missing, " "), strings.Join(wanted, " "), h.afresh())
	}
	dirs := make([]string, 0, strings.Count(rel, "/"))
	for _, p := range slices.Backward(candidates(rel)) {
		if p != rel {
			dirs = append(dirs, pl.dir(p))
		}
	}
	if len(dirs) == 0 {
		return ""
	}
	return fmt.Sprintf("%s: not enabled above %s; have root run `for d in %s; do echo \"+%s\" > $d/cgroup.subtree_control; done`",
		strings.Join(missing, " "), pl.dir(rel), strings.Join(dirs, " "), strings.Join(missing, " +"))
}

// checkName refuses what is not one component of a path.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\n\x00") {
		return fmt.Errorf("cgroup name %q: %w", name, ErrInvalidPath)
	}
	return nil
}
