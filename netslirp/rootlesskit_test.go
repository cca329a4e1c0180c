package netslirp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/child"
	"github.com/rootless-containers/rootlesskit/v3/pkg/parent"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/rootless/nstest"
)

// The drivers are tested with what they are for: rootlesskit's parent and child and slirp4netns. This binary plays
// each part, told by the environment:
//
//	TestNodeOfRootlesskit           the host: a network namespace with an address, a name server and a LAN behind it
//	└ parent (roleEnv)              rootlesskit's parent, in that host; starts slirp4netns
//	  └ child (pipeEnv)             rootlesskit's child, in a user namespace inside
//	    └ daemon (roleEnv)          TestInsideNode: opens the Network, attaches pods and asks from all sides
const (
	roleEnv     = "NETSLIRP_TEST_ROLE"
	dirEnv      = "NETSLIRP_TEST_DIR"
	pipeEnv     = "NETSLIRP_TEST_PIPE"
	rkStateEnv  = "NETSLIRP_TEST_STATE"
	activateEnv = "NETSLIRP_TEST_ACTIVATE"
)

const (
	hostIP   = "192.0.2.10" // the host's address on its LAN
	lanIP    = "192.0.2.77" // another machine there
	hostName = "host.example."

	lanLocal  = "fd00:77::77"  // that machine's IPv6 addresses: of a private network
	lanGlobal = "2001:db8::77" // and of the world
	hostLocal = "fd00:77::10"
	hostWorld = "2001:db8::10"
)

func serveRole(m *testing.M) (bool, error) {
	switch {
	case os.Args[0] == "unshare": // rootlesskit: unshare -n mount --bind /proc/self/ns/net PATH
		return true, OnOwnThread(func() error {
			return errors.Join(unix.Unshare(unix.CLONE_NEWNET),
				unix.Mount("/proc/thread-self/ns/net", os.Args[len(os.Args)-1], "", unix.MS_BIND, ""))
		})
	case os.Getenv(pipeEnv) != "":
		return true, playChild()
	case os.Getenv(roleEnv) == "parent":
		return true, playParent()
	case os.Getenv(roleEnv) == "daemon":
		if code := m.Run(); code != 0 {
			return true, errors.New("the tests inside the node failed")
		}
		return true, nil
	}
	return false, nil
}

func playParent() error {
	state := os.Getenv(rkStateEnv)
	if err := parent.InitStateDir(state); err != nil {
		return err
	}
	network, ports, err := ParentDriver(DriverConfig{DisableHostLoopback: true}, state)
	if err != nil {
		return err
	}
	return parent.Parent(parent.Opt{PipeFDEnvKey: pipeEnv, ChildUseActivationEnvKey: activateEnv, StateDir: state, StateDirEnvKey: rkStateEnv,
		NetworkDriver: network, PortDriver: ports, CreatePIDNS: true, CreateCgroupNS: true, CreateUTSNS: true, CreateIPCNS: true,
		DetachNetNS: true, Propagation: "rslave", SubidSource: parent.SubidSourceStatic})
}

func playChild() error {
	network, ports, err := ChildDriver("", nil)
	if err != nil {
		return err
	}
	if err := os.Setenv(roleEnv, "daemon"); err != nil {
		return err
	}
	return child.Child(child.Opt{PipeFDEnvKey: pipeEnv, ChildUseActivationEnvKey: activateEnv, RunActivationHelperEnvKey: activateEnv + "_RUN",
		StateDirEnvKey: rkStateEnv, NetworkDriver: network, PortDriver: ports, DetachNetNS: true, MountProcfs: true, Reaper: true,
		Propagation: "rslave", TargetCmd: []string{"/proc/self/exe", "-test.run=^TestInsideNode$", "-test.v"}})
}

func TestNodeOfRootlesskit(t *testing.T) {
	if err := CheckDriver(DriverConfig{}); err != nil {
		t.Fatal(err)
	}
	if nstest.IDs() == 1 {
		t.Skip("rootlesskit needs subordinate ids: newuidmap or /etc/subuid is missing")
	}
	dir := t.TempDir()
	lan := layHost(t, dir)
	state := filepath.Join(dir, "rk")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=parent", dirEnv+"="+dir, rkStateEnv+"="+state)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, OnOwnThread(func() error {
		// An ordinary user may not bind ports below 1024; root of these namespaces could. A program that is
		// started gets no more than this set.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_BIND_SERVICE, 0, 0, 0); err != nil {
			return err
		}
		return cmd.Start()
	}))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	// Another machine of the LAN asks the published port, when the pod's server is there, and says what it got.
	wait(t, filepath.Join(dir, "pod-is-up"), ended, &out)
	for range 3 {
		got, err := ask(lan, "tcp", hostIP+":20080")
		if err != nil || got != "pod "+lanIP {
			t.Errorf("from the LAN the pod answered %q, %v; want it to see %s", got, err, lanIP)
		}
	}
	got, err := ask(lan, "udp", hostIP+":20053")
	if err != nil || !strings.HasPrefix(got, "pod ") {
		t.Errorf("from the LAN the pod answered %q, %v", got, err)
	}
	// By IPv6 a pod is shown the clients that it can answer.
	for node, seen := range map[string]string{hostLocal: lanLocal, hostWorld: sixOf("1")} {
		if got, err := ask(lan, "tcp", join(node, 20086)); err != nil || got != "pod "+seen {
			t.Errorf("from the LAN by IPv6 the pod answered %q, %v; want it to see %s", got, err, seen)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "lan-is-done"), nil, 0o600))
	wait(t, filepath.Join(dir, "pods-are-gone"), ended, &out)
	slirp := pidOf(t, "slirp4netns")
	must(t, unix.Kill(slirp, unix.SIGKILL))
	eventually(t, "the end of slirp4netns", func() error {
		if err := unix.Kill(slirp, 0); !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d: %w", slirp, err)
		}
		return nil
	})
	must(t, os.WriteFile(filepath.Join(dir, "slirp-is-dead"), nil, 0o600))
	if err := <-ended; err != nil {
		t.Errorf("the node: %v", err)
	}
	t.Logf("inside the node:\n%s", out.Bytes())
	if !strings.Contains(out.String(), "the user-mode network has ended (signal: killed): starting it again") {
		t.Error("the end of slirp4netns is not in the log")
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("rootlesskit's directory is left: %v", err)
	}
}

func wait(t *testing.T, path string, ended chan error, out *bytes.Buffer) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case err := <-ended:
			t.Fatalf("the node ended: %v\n%s", err, out.Bytes())
		case <-deadline:
			t.Fatal("the node does not come up")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// pidOf finds the one process of the tests' pid namespace with that name.
func pidOf(t *testing.T, name string) int {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, file := range files {
		if comm, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(comm)) == name {
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			must(t, err)
			return pid
		}
	}
	t.Fatalf("no process is called %s", name)
	return 0
}

// layHost makes the namespace of the tests a host: a LAN, a name server on 127.0.0.53 as systemd-resolved's, a
// web server on its address and one on its loopback, subordinate ids for root, and a port start of 1024.
func layHost(t *testing.T, dir string) (lan string) {
	t.Helper()
	lan = newNetNS(t)
	ns, err := openNetNS(lan)
	must(t, err)
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "lan0"
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "lan0", netlink.NsFd(int(ns.Fd()))
	must(t, errors.Join(setUpLo(), netlink.LinkAdd(veth), address("lan0", hostIP+"/24"), address("lan0", hostLocal+"/64"), address("lan0", hostWorld+"/64")))
	t.Cleanup(func() {
		if link, err := netlink.LinkByName("lan0"); err == nil {
			must(t, netlink.LinkDel(link))
		}
	})
	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(lanIP)}))
	within(t, lan, func() error {
		return errors.Join(setUpLo(), address("lan0", lanIP+"/24"), address("lan0", lanLocal+"/64"), address("lan0", lanGlobal+"/64"))
	})
	serveTCP(t, lan, ":80", "lan")
	for _, s := range []string{hostIP + ":8080", "127.0.0.1:8081"} {
		l, err := net.Listen("tcp", s)
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, "host")
				c.Close()
			}
		}()
	}
	serveDNS(t)
	for path, content := range map[string]string{
		"/etc/resolv.conf": "nameserver 127.0.0.53\nsearch lan.example\n", "/etc/subuid": "root:1:65536\n", "/etc/subgid": "root:1:65536\n"} {
		file := filepath.Join(dir, filepath.Base(path))
		must(t, os.WriteFile(file, []byte(content), 0o644))
		must(t, unix.Mount(file, path, "", unix.MS_BIND, ""))
		t.Cleanup(func() { must(t, unix.Unmount(path, unix.MNT_DETACH)) })
	}
	return lan
}

// serveDNS answers every query with one A record, the host's address.
func serveDNS(t *testing.T) {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.53:53")
	must(t, err)
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			end := 12 + bytes.IndexByte(buf[12:n], 0) + 5 // header, name, type and class
			reply := append([]byte{}, buf[:end]...)
			copy(reply[2:], []byte{0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0})
			reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
			_, _ = c.WriteTo(append(reply, net.ParseIP(hostIP).To4()...), from) // the client asks once more, or fails
		}
	}()
}

// TestInsideNode runs as the daemon does: root of the user namespace, in the host's network namespace, which that
// user namespace does not own.
func TestInsideNode(t *testing.T) {
	if os.Getenv(roleEnv) != "daemon" {
		t.Skip("is run by TestNodeOfRootlesskit")
	}
	dir, state := os.Getenv(dirEnv), os.Getenv(rkStateEnv)
	ctx := context.Background()
	n, err := Open(Config{NetNS: filepath.Join(state, "netns"), APISocket: filepath.Join(state, "api.sock"),
		Dir: filepath.Join(dir, "net"), DNS: "10.0.2.3", HostResolvConf: "/etc/resolv.conf"})
	must(t, err)
	defer func() { must(t, n.Close()) }()
	must(t, n.Reconcile(ctx, nil))
	must(t, n.Ready())

	server := insidePod(t, n, "server", PortMapping{HostPort: 20080, ContainerPort: 80}, PortMapping{Protocol: "udp", HostPort: 20053, ContainerPort: 53},
		PortMapping{HostPort: 20086, ContainerPort: 80, HostIP: "::"})
	client := insidePod(t, n, "client")
	serveTCP(t, server.ns, ":80", "pod")
	serveUDP(t, server.ns, ":53", "pod")
	must(t, os.WriteFile(filepath.Join(dir, "pod-is-up"), nil, 0o600))

	// Out, through slirp4netns: the host's address, a machine of its LAN, names as the host resolves them.
	wantAnswer(t, client.ns, "tcp", hostIP+":8080", "host")
	wantAnswer(t, client.ns, "tcp", lanIP+":80", "lan "+hostIP)
	wantSilence(t, client.ns, "tcp", "10.0.2.2:8081") // the host's loopback, which slirp4netns would lend
	wantFiltered(t, n)
	if got := resolve(t, client.ns, n.cfg.DNS); got != hostIP {
		t.Errorf("%s is %q, want %s", hostName, got, hostIP)
	}
	if conf, err := n.ResolvConf(nil, nil, nil); err != nil || conf != "nameserver 10.0.2.3\nsearch lan.example\n" {
		t.Errorf("resolv.conf is %q, %v", conf, err)
	}
	// In, through the port driver: from the host itself, and from other pods at every address of the node.
	for node, seen := range map[string]string{"127.0.0.1": "10.88.0.1", hostIP: hostIP} {
		wantAnswer(t, "", "tcp", join(node, 20080), "pod "+seen)
		wantAnswer(t, "", "udp", join(node, 20053), "pod 10.88.0.1")
	}
	wantAnswer(t, client.ns, "tcp", "10.0.2.100:20080", "pod "+client.ip)
	wantAnswer(t, client.ns, "udp", "10.0.2.100:20053", "pod "+client.ip)
	wantAnswer(t, client.ns, "tcp", hostIP+":20080", "pod "+hostIP)
	_, err = n.Attach(ctx, AttachRequest{PodID: "low", NetNS: newNetNS(t), Ports: []PortMapping{{HostPort: 81, ContainerPort: 80}}})
	wantIs(t, err, ErrPortReserved, "publish host port :81/tcp: host port is reserved for root; run: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=81")
	conn, err := n.DialPod(ctx, server.ns, "localhost:80")
	must(t, err)
	conn.Close()
	home(t)

	wait(t, filepath.Join(dir, "lan-is-done"), nil, nil)
	for _, p := range []pod{server, client} {
		must(t, n.Detach(ctx, p.id, p.ns))
	}
	wantSilence(t, "", "tcp", "127.0.0.1:20080")
	home(t)

	// slirp4netns is killed; it comes back, and with it the world.
	client = insidePod(t, n, "client")
	wantAnswer(t, client.ns, "tcp", hostIP+":8080", "host")
	must(t, os.WriteFile(filepath.Join(dir, "pods-are-gone"), nil, 0o600))
	wait(t, filepath.Join(dir, "slirp-is-dead"), nil, nil)
	neverUnfiltered := sendAllTheWhile(t, n)
	eventually(t, "slirp4netns is started again", n.Ready)
	neverUnfiltered()
	wantAnswer(t, client.ns, "tcp", hostIP+":8080", "host")
	wantAnswer(t, client.ns, "tcp", lanIP+":80", "lan "+hostIP)
	wantFiltered(t, n)
	must(t, n.Detach(ctx, client.id, client.ns))
}

func insidePod(t *testing.T, n *Network, id string, ports ...PortMapping) pod {
	t.Helper()
	p := pod{id: id, ns: newNetNS(t)}
	got, err := n.Attach(context.Background(), AttachRequest{PodID: id, NetNS: p.ns, Ports: ports})
	must(t, err)
	p.ip = got.IP
	return p
}

// resolve asks the server for the A record of hostName.
func resolve(t *testing.T, ns, server string) string {
	t.Helper()
	var conn net.Conn
	within(t, ns, func() (err error) {
		conn, err = net.Dial("udp", server+":53")
		return err
	})
	defer conn.Close()
	query := []byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for _, label := range strings.Split(strings.TrimSuffix(hostName, "."), ".") {
		query = append(append(query, byte(len(label))), label...)
	}
	query = append(query, 0, 0, 1, 0, 1)
	must(t, conn.SetDeadline(time.Now().Add(3*time.Second)))
	_, err := conn.Write(query)
	must(t, err)
	reply := make([]byte, 512)
	size, err := conn.Read(reply)
	if err != nil || size < 4 {
		return fmt.Sprint(err)
	}
	return net.IP(reply[size-4 : size]).String()
}
