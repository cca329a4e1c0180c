package cgroupv2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// askTimeout bounds all that a start waits for the user's systemd: a bus that hangs must not hang the node.
const askTimeout = 10 * time.Second

// manager is the systemd of the user's session, as far as a node needs it.
type manager interface {
	// group is the manager's own cgroup, relative to the root of the hierarchy.
	group(ctx context.Context) (string, error)
	// startScope makes the transient scope and moves the process into it. It returns when that is done.
	startScope(ctx context.Context, name, description string, pid int) error
	// attach moves the process into a cgroup below that of a unit which delegates.
	attach(ctx context.Context, unit, below string, pid int) error
	close()
}

// userSystemd is the manager on the other end of the user's D-Bus.
type userSystemd struct{ conn *systemd.Conn }

// dialUserSystemd connects to the bus of this user's session. Only sockets are tried: a D-Bus library that is left to
// find its bus starts one.
func dialUserSystemd(ctx context.Context) (manager, error) {
	var errs []error
	for _, address := range busAddresses(os.Getenv, os.Getuid()) {
		conn, err := systemd.NewConnection(func() (*dbus.Conn, error) {
			return dbus.Connect(address, dbus.WithContext(ctx), dbus.WithAuth(dbus.AuthExternal(strconv.Itoa(os.Getuid()))))
		})
		if err == nil {
			return userSystemd{conn}, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	return nil, errors.Join(errs...)
}

// busAddresses lists where the bus of a user's session may be: as the session says it, else where systemd puts it.
func busAddresses(getenv func(string) string, uid int) []string {
	var list []string
	add := func(address string) {
		if address != "" && !slices.Contains(list, address) {
			list = append(list, address)
		}
	}
	if a := getenv("DBUS_SESSION_BUS_ADDRESS"); strings.HasPrefix(a, "unix:") {
		add(a)
	}
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		add("unix:path=" + dbus.EscapeBusAddressValue(filepath.Join(dir, "bus")))
	}
	add(fmt.Sprintf("unix:path=/run/user/%d/bus", uid))
	return list
}

func (u userSystemd) group(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	quoted, err := u.conn.GetManagerProperty("ControlGroup") // a GVariant's text
	if err != nil {
		return "", fmt.Errorf("ask systemd for its cgroup: %w", err)
	}
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return "", fmt.Errorf("parse systemd's cgroup %s: %w", quoted, err)
	}
	return text, nil
}

func (u userSystemd) startScope(ctx context.Context, name, description string, pid int) error {
	done := make(chan string, 1)
	// A unit with Delegate=yes goes on after an OOM kill in it (systemd.service(5), OOMPolicy). CollectMode: it goes
	// when its last process has, however that ended. The node's own limits are those of its pods.
	_, err := u.conn.StartTransientUnitContext(ctx, name, "fail", []systemd.Property{
		systemd.PropDescription(description), systemd.PropPids(uint32(pid)),
		{Name: "Delegate", Value: dbus.MakeVariant(true)},
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
		{Name: "TasksMax", Value: dbus.MakeVariant(^uint64(0))},
	}, done)
	if err != nil {
		return fmt.Errorf("start scope %s: %w", name, err)
	}
	select {
	case how := <-done:
		if how != "done" {
			return fmt.Errorf("start scope %s: systemd says %q; see: journalctl --user -u %s", name, how, name)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start scope %s: %w", name, ctx.Err())
	}
}

func (u userSystemd) close() { u.conn.Close() }

// offer looks at what a scope of the user's systemd would give, without making one: the controllers that the manager
// itself was given.
func (h host) offer(pl place) (group string, controllers []string, err error) {
	if h.dial == nil {
		return "", nil, errors.New("not asked")
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	m, err := h.dial(ctx)
	if err != nil {
		return "", nil, err
	}
	defer m.close()
	if group, err = m.group(ctx); err != nil {
		return "", nil, err
	}
	controllers, err = h.group(pl.dir(group)).available()
	return group, controllers, err
}

// Obtain makes true what Find has promised: where that was a scope of the user's systemd, it has one made and this
// process moved into it. The scope goes when its last process has ended; nothing has to be given back. Where
// systemd does not keep its word the node takes what this process has without, and Attempts says so.
func (d Delegation) Obtain(node string) (Delegation, error) {
	if !d.Scope {
		return d, nil
	}
	return thisHost().obtain(d, node)
}

func (h host) obtain(d Delegation, node string) (Delegation, error) {
	scopeErr := h.enterScope(node)
	h.dial = nil // asked already
	got, err := h.find()
	if err != nil {
		return Delegation{}, err
	}
	last := len(d.Attempts) - 1
	got.Attempts = d.Attempts
	if scopeErr != nil {
		got.Attempts[last] = "scope of the user's systemd: " + scopeErr.Error()
		got.Hint = joinHints(got.Hint, "journalctl --user -e may say more about the scope")
		return got, nil
	}
	got.Attempts[last] = "scope of the user's systemd: " + got.Sentence
	got.Hint = joinHints(got.Hint, h.linger())
	return got, nil
}

func (h host) enterScope(node string) error {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	m, err := h.dial(ctx)
	if err != nil {
		return err
	}
	defer m.close()
	// With the pid, so that a unit of a predecessor that is still ending is not in the way.
	return m.startScope(ctx, fmt.Sprintf("%s%s-%d.scope", groupPrefix, node, h.pid), "coracle node "+node, h.pid)
}

// linger says that the node ends with the session, where it does: then systemd stops the user's manager, and the scope.
func (h host) linger() string {
	if h.user == "" || h.root == "" && !h.underSystemd() || h.lingers() {
		return ""
	}
	return fmt.Sprintf("the node ends with your last session; to keep it, run: sudo loginctl enable-linger %s", h.user)
}

// lingers tells whether the user's systemd runs without a login, too.
func (h host) lingers() bool {
	if h.user == "" {
		return false
	}
	_, err := os.Stat(filepath.Join(h.root+"/var/lib/systemd/linger", h.user))
	return err == nil
}

// afresh says how the user's systemd comes to be started with other settings: a reload does not give it controllers.
func (h host) afresh() string {
	if !h.lingers() {
		return "log in again, out of every session"
	}
	return fmt.Sprintf("start the user's systemd again, which lingers and with which all ends that it runs: `sudo systemctl restart user@%d.service`", h.uid)
}

// joinHints makes one text of those that say something.
func joinHints(hints ...string) string {
	return strings.Join(slices.DeleteFunc(hints, func(h string) bool { return h == "" }), "; ")
}
