package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coracle-cri/coracle/e2e/box"
	"github.com/coracle-cri/coracle/e2e/fixture"
)

// TestDistribution runs a real distribution's image, with more than 15,000 files in gzip and zstd layers, from a
// registry with TLS by its own authority and basic authentication, on a host with its own name server: pulled, run as
// an ordinary user, serving HTTP to another pod and to the host, reaching the host's network, and resolving names as
// the host does.
func TestDistribution(t *testing.T) {
	if !box.Inside() {
		box.Run(t, box.Host{Search: "corp.test", Names: map[string]string{
			"registry.corp.test": box.Address, "intranet.corp.test": box.Address, "vpn.example.test": "203.0.113.7"}})
		return
	}
	d := &distribution{web: "from the host's network\n"}
	d.serveHost(t)
	d.startRegistry(t)
	d.node = d.home.up("default")
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"pull", d.pull}, {"serve", d.serve}, {"files", d.files}, {"another pod", d.otherPod}, {"host port", d.hostPort},
		{"the host's network", d.hostNetwork}, {"names", d.names}, {"the pod's own names", d.ownNames}, {"ports are free again", d.freed},
	} {
		ok := t.Run(step.name, func(t *testing.T) {
			d.t = t
			step.do(t)
		})
		if d.t = t; !ok {
			t.Fatal("a later step needs this one")
		}
	}
	d.down()
}

type distribution struct {
	*node
	home           *home
	registry       *fixture.Registry
	image, web     string
	webAddr        string // of a web server on the host's own address
	webPod, webIP  string
	server, echo   string
	client, cliPod string
}

// The ports that the web pod publishes on the host.
const (
	portAll   = "18080" // on every address
	portLocal = "18081" // on 127.0.0.1 only
	portUDP   = "19999"
)

// serveHost is a machine in the host's network: here, a web server on the host's own address that is not loopback.
func (d *distribution) serveHost(t *testing.T) {
	l, err := net.Listen("tcp", box.Address+":0")
	if err != nil {
		t.Fatal(err)
	}
	d.webAddr = l.Addr().String()
	server := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, d.web)
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-served })
}

func (d *distribution) startRegistry(t *testing.T) {
	tar, err := fixture.RootfsTar()
	if err != nil {
		t.Fatal(err)
	}
	dist, err := fixture.NewDistribution(tar)
	if err != nil {
		t.Fatal(err)
	}
	if dist.Entries <= 15000 {
		t.Errorf("the image has %d files, directories and links, want over 15000", dist.Entries)
	}
	layers, err := dist.Image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	size := int64(0)
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		size += n
	}
	t.Logf("image of %d entries in %d layers, %d MB", dist.Entries, len(layers), size>>20)
	d.registry = newRegistry(t, fixture.RegistryOptions{Listen: box.Address + ":5443", TLSNames: []string{"registry.corp.test", box.Address},
		User: "ann", Password: "secret"})
	if _, err := d.registry.Push(context.Background(), "distribution/web:1", dist.Image); err != nil {
		t.Fatal(err)
	}
	d.image = "registry.corp.test:5443/distribution/web:1"
	d.home = newHome(t)
	ca := d.home.write("ca.pem", string(d.registry.CA))
	dir := d.home.mkdir("config", "coracle")
	d.home.writeAt(dir+"/config.yaml", "registries:\n  registry.corp.test:5443:\n    caFile: "+ca+"\n")
}

func (d *distribution) pull(t *testing.T) {
	if r := d.try("pull", d.image); r.code == 0 {
		t.Error("a pull without credentials succeeded")
	}
	if r := d.try("pull", "--creds", "ann:wrong", d.image); r.code == 0 || strings.Contains(r.errs+d.logged(), "wrong") {
		t.Errorf("a pull with wrong credentials: exit code %d (and the password is nowhere to be shown)\n%s", r.code, r.errs)
	}
	began := time.Now()
	d.crictl("pull", "--creds", "ann:secret", d.image)
	t.Logf("pulled in %s", time.Since(began).Round(time.Millisecond))
	blobs := func(method, path string) bool { return method == http.MethodGet && strings.Contains(path, "/blobs/") }
	fetched := d.registry.Requests(blobs)

	// The user's docker config.json serves as well, and what is there already is not fetched again.
	docker := d.home.mkdir("home", ".docker")
	d.home.writeAt(docker+"/config.json", fmt.Sprintf(`{"auths":{"registry.corp.test:5443":{"auth":%q}}}`,
		base64.StdEncoding.EncodeToString([]byte("ann:secret"))))
	d.crictl("pull", d.image)
	if again := d.registry.Requests(blobs); again > fetched+1 {
		t.Errorf("a second pull fetched %d blobs again", again-fetched)
	}
	if d.logContains("secret") {
		t.Error("the password is in the node's log")
	}
}

func (d *distribution) serve(t *testing.T) {
	pod, file := d.runPod("web", object{"port_mappings": []object{
		{"protocol": 0, "container_port": 8080, "host_port": 18080},
		{"protocol": 0, "container_port": 8080, "host_port": 18081, "host_ip": "127.0.0.1"},
		{"protocol": 1, "container_port": 9999, "host_port": 19999},
	}})
	d.webPod, d.webIP = pod, d.podIP(pod)
	d.server = d.start(pod, file, "nginx", d.image, object{"linux": object{"security_context": object{"run_as_user": object{"value": 1000}}}})
	d.echo = d.start(pod, file, "echo", d.image, object{"command": []string{"python3", "/srv/echo.py", "9999"}})
	var cliFile string
	d.cliPod, cliFile = d.runPod("client", nil)
	d.client = d.start(d.cliPod, cliFile, "client", d.image, object{"command": []string{"sleep", "100000"}})
	for _, id := range []string{d.server, d.echo, d.client} {
		if who := d.exec(id, "id", "-u"); who != "1000" {
			t.Errorf("container %s runs as uid %s, want 1000 (by run_as_user, or by the image's user)", id, who)
		}
	}
	eventually(t, 10*time.Second, "nginx and echo are up", func() error {
		if _, err := d.fetch(d.webIP + ":8080"); err != nil {
			return fmt.Errorf("%w; nginx says:\n%s", err, d.crictl("logs", d.server))
		}
		if log := d.crictl("logs", d.echo); !strings.Contains(log, "echo ready") {
			return fmt.Errorf("echo says %q", log)
		}
		return nil
	})
	if log := d.try("logs", d.server); !strings.Contains(log.out, "GET / HTTP") {
		t.Errorf("nginx's access log, written to /dev/stdout by an ordinary user, is not in the container's: %q %q", log.out, log.errs)
	}
}

// fetch is an HTTP request from the client pod.
func (d *distribution) fetch(addr string) (string, error) {
	r := d.try("exec", d.client, "python3", "-c",
		fmt.Sprintf(`import urllib.request; print(urllib.request.urlopen("http://%s/", timeout=5).read().decode(), end="")`, addr))
	if r.code != 0 {
		return "", fmt.Errorf("exit code %d: %s", r.code, tail(r.errs, 2))
	}
	return r.out, nil
}

// files looks at what unpacking layers makes difficult; see fixture's extras. The distribution's packages then check
// their own files by their own sums.
func (d *distribution) files(t *testing.T) {
	script := `cd /srv/x
for f in gone gonedir opaque/old turns/inner; do [ -e $f ] && echo "$f is still there"; done
for f in keep opaque/new turns abs; do [ -e $f ] || echo "$f is missing"; done
[ "$(stat -c %h hard-a)" = 2 ] && [ hard-a -ef hard-z ] || echo "hard-a and hard-z are not one file"
[ "$(stat -c '%u %g %a' of-web)" = "1000 1000 600" ] || echo "of-web: $(stat -c '%u %g %a' of-web)"
[ "$(stat -c %a suid)" = 4755 ] && [ "$(stat -c %a sticky)" = 1777 ] || echo "modes: $(stat -c %a suid sticky)"
[ "$(python3 -c 'import os; print(os.getxattr("attr", "user.note").decode())')" = kept ] || echo "attribute lost"
[ "$(find . -name 'fff*' | wc -c)" -gt 250 ] || echo "the long name is missing"
[ "$(find / -xdev -name '.wh.*' 2>/dev/null)" = "" ] || echo "whiteouts show"
[ "$(find / -xdev 2>/dev/null | wc -l)" -gt 15000 ] || echo "only $(find / -xdev | wc -l) files"
echo checked`
	if out := d.exec(d.server, "sh", "-c", script); out != "checked" {
		t.Errorf("files of the image:\n%s", out)
	}
	if r := d.try("exec", d.client, "dpkg", "--verify"); r.code != 0 || r.out != "" {
		t.Errorf("the distribution's own check of its files: exit code %d\n%s%s", r.code, r.out, r.errs)
	}
	if out := d.exec(d.client, "python3", "-c", "import django; print(django.__name__)"); out != "django" {
		t.Errorf("a large package of the distribution: %q", out)
	}
}

func (d *distribution) otherPod(t *testing.T) {
	if body, err := d.fetch(d.webIP + ":8080"); err != nil || body != fixture.Page {
		t.Errorf("from another pod: %q, %v", body, err)
	}
	if d.podIP(d.cliPod) == d.webIP {
		t.Errorf("both pods have the address %s", d.webIP)
	}
}

func (d *distribution) hostPort(t *testing.T) {
	d.hostPortsAnswer()
	if _, err := net.DialTimeout("tcp", box.Address+":"+portLocal, time.Second); err == nil {
		t.Errorf("port %s was asked for on 127.0.0.1 and answers on %s", portLocal, box.Address)
	}
	conn, err := net.Dial("udp", "127.0.0.1:"+portUDP)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, 5*time.Second, "the pod answers over UDP", func() error {
		if _, err := conn.Write([]byte("ping")); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		if err == nil && string(buf[:n]) != "echo ping" {
			err = fmt.Errorf("it answered %q", buf[:n])
		}
		return err
	})
	// The same port for a second pod is an error that names it, and leaves no pod.
	r := d.try("runp", d.podConfig("thief", object{"port_mappings": []object{{"protocol": 0, "container_port": 80, "host_port": 18080}}}))
	if r.code == 0 || !strings.Contains(r.errs, "18080") {
		t.Errorf("a second pod got host port 18080: exit code %d, %s", r.code, r.errs)
	}
	if out := d.crictl("pods", "-q", "--name", "thief"); out != "" {
		t.Errorf("the pod that could not be run is shown: %s", out)
	}
	d.hostPortsAnswer() // still
}

// hostPortsAnswer asks the web pod by each of its TCP ports on the host.
func (d *distribution) hostPortsAnswer() {
	d.t.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, addr := range []string{"127.0.0.1:" + portAll, box.Address + ":" + portAll, "127.0.0.1:" + portLocal} {
		if body, err := get(client, "http://"+addr+"/"); err != nil || body != fixture.Page {
			d.t.Errorf("host port %s: %q, %v", addr, body, err)
		}
	}
	for _, port := range []string{portAll, portLocal} { // as critest, a kubelet and host-network pods ask, inside the node
		if r := d.coracle("enter", "--", "curl", "-fsS", "--max-time", "5", "http://127.0.0.1:"+port+"/"); r.code != 0 || r.out != fixture.Page {
			d.t.Errorf("host port %s inside the node: exit code %d, %q, %s", port, r.code, r.out, r.errs)
		}
	}
}

func (d *distribution) hostNetwork(t *testing.T) {
	if body, err := d.fetch(d.webAddr); err != nil || body != d.web {
		t.Errorf("a server in the host's network: %q, %v", body, err)
	}
	// The host's own loopback is not for pods, unless the user says so.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if r := d.try("exec", d.client, "python3", "-c", fmt.Sprintf(`import socket; socket.create_connection(("10.0.2.2", %s), 2)`, port)); r.code == 0 {
		t.Error("a pod reached the host's 127.0.0.1")
	}
}

// names compares what names mean in a pod and on the host, whose name server is on a loopback address and whose
// search domain completes short names.
func (d *distribution) names(t *testing.T) {
	for _, name := range []string{"intranet.corp.test", "intranet", "vpn.example.test", "absent.corp.test"} {
		want := "none"
		if found, err := net.LookupHost(name); err == nil {
			want = found[0]
		}
		r := d.try("exec", d.client, "python3", "-c", fmt.Sprintf(`import socket
try: print(socket.gethostbyname(%q))
except OSError: print("none")`, name))
		if got := strings.TrimSpace(r.out); got != want {
			t.Errorf("%s is %s on the host and %q in the pod\n%s%s", name, want, got, r.errs, d.exec(d.client, "cat", "/etc/resolv.conf"))
		}
	}
	if body, err := d.fetch("intranet:" + d.webAddr[strings.LastIndexByte(d.webAddr, ':')+1:]); err != nil || body != d.web {
		t.Errorf("by name: %q, %v", body, err)
	}
}

func (d *distribution) ownNames(t *testing.T) {
	pod, file := d.runPod("named", object{"dns_config": object{"servers": []string{"192.0.2.53"}, "searches": []string{"a.test", "b.test"}, "options": []string{"ndots:3"}}})
	id := d.start(pod, file, "named", d.image, object{"command": []string{"sleep", "1000"}})
	got := d.exec(id, "cat", "/etc/resolv.conf")
	for _, want := range []string{"nameserver 192.0.2.53", "search a.test b.test", "options ndots:3"} {
		if !strings.Contains(got, want) {
			t.Errorf("resolv.conf has no %q:\n%s", want, got)
		}
	}
	if strings.Count(got, "nameserver") != 1 {
		t.Errorf("resolv.conf has a server of its own:\n%s", got)
	}
	if got := d.exec(id, "hostname"); got != "named" {
		t.Errorf("hostname %q", got)
	}
	d.crictl("rmp", "-f", pod)
}

func (d *distribution) freed(t *testing.T) {
	d.crictl("stopp", d.webPod)
	for _, addr := range []string{"0.0.0.0:" + portAll, "127.0.0.1:" + portLocal} {
		if l, err := net.Listen("tcp", addr); err != nil {
			t.Errorf("after the pod was stopped: %v", err)
		} else {
			l.Close()
		}
	}
	if l, err := net.ListenPacket("udp", "127.0.0.1:"+portUDP); err != nil {
		t.Errorf("after the pod was stopped: %v", err)
	} else {
		l.Close()
	}
}
