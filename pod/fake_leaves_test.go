package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

// failures are errors that a test wants of a fake.
type failures struct {
	mu   sync.Mutex
	errs map[string]error
	when map[string]func()
}

// on calls fn at every call of op.
func (f *failures) on(op string, fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.when = map[string]func(){op: fn}
}

func (f *failures) set(op string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.errs == nil {
		f.errs = map[string]error{}
	}
	f.errs[op] = err
}

func (f *failures) get(op string) error {
	f.mu.Lock()
	fn, err := f.when[op], f.errs[op]
	f.mu.Unlock()
	if fn != nil {
		fn()
	}
	return err
}

// fakeNetwork gives out addresses, brings the loopback of real namespaces up, and opens real sockets in them.
type fakeNetwork struct {
	failures
	mu       sync.Mutex
	node     string // a pinned network namespace
	next     int
	attached map[string]netslirp.AttachRequest
	cidr     string
}

func (n *fakeNetwork) Attach(ctx context.Context, req netslirp.AttachRequest) (netslirp.Attachment, error) {
	if err := errors.Join(n.get("attach"), ctx.Err()); err != nil {
		return netslirp.Attachment{}, err
	}
	if err := inNetNS(req.NetNS, upLoopback); err != nil {
		return netslirp.Attachment{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.next++
	n.attached[req.PodID] = req
	return netslirp.Attachment{IP: fmt.Sprintf("10.88.0.%d", n.next), AdditionalIPs: []string{fmt.Sprintf("fd00::%d", n.next)}}, nil
}

// has tells whether any pod is attached.
func (n *fakeNetwork) has() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.attached) > 0
}

func (n *fakeNetwork) Detach(_ context.Context, podID, _ string) error {
	if err := n.get("detach"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.attached, podID)
	return nil
}

func (n *fakeNetwork) Reconcile(_ context.Context, live map[string]bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id := range n.attached {
		if !live[id] {
			delete(n.attached, id)
		}
	}
	return nil
}

// SetPodCIDR takes what the real one takes, but for what is on a node already.
func (n *fakeNetwork) SetPodCIDR(cidr string) error {
	if cidr == "" {
		return nil
	}
	if err := netslirp.CheckPodCIDR(cidr); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cidr = cidr
	return nil
}

func (n *fakeNetwork) ResolvConf(servers, searches, _ []string) (string, error) {
	if len(servers) == 0 {
		servers = []string{"10.0.2.3"}
	}
	return "nameserver " + strings.Join(servers, "\nnameserver ") + "\nsearch " + strings.Join(searches, " ") + "\n", n.get("resolv")
}

func (n *fakeNetwork) DialPod(ctx context.Context, netNS, addr string) (conn net.Conn, err error) {
	nsErr := inNetNS(netNS, func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		return nil
	})
	return conn, errors.Join(err, nsErr)
}

func (n *fakeNetwork) ListenNode(addr string) (l net.Listener, err error) {
	if err := n.get("listen"); err != nil {
		return nil, err
	}
	nsErr := inNetNS(n.node, func() error {
		l, err = net.Listen("tcp", addr)
		return nil
	})
	return l, errors.Join(err, nsErr)
}

// Usage counts a byte in for each attached pod.
func (n *fakeNetwork) Usage() (map[string]netslirp.Traffic, error) {
	if err := n.get("usage"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	usage := map[string]netslirp.Traffic{}
	for id := range n.attached {
		usage[id] = netslirp.Traffic{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8}
	}
	return usage, nil
}

func (n *fakeNetwork) Ready() error            { return n.get("ready") }
func (n *fakeNetwork) Info() map[string]string { return map[string]string{"driver": "fake"} }

func inNetNS(path string, fn func() error) error {
	return netslirp.OnOwnThread(func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

func upLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// fakeImages knows one image and makes directories for root filesystems.
type fakeImages struct {
	failures
	mu      sync.Mutex
	root    string
	mounted map[string]bool
	volumes map[string]bool
	// unmeasured: nobody has measured a writable layer yet, nor does so now.
	unmeasured bool
}

const (
	missingSubPath = "no/such/path"

	testImage   = "registry.test/app:1"
	testImageID = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	testDigest  = "registry.test/app@sha256:2222222222222222222222222222222222222222222222222222222222222222"
)

func (f *fakeImages) Get(ref string) (images.Image, error) {
	if ref != testImage && ref != testImageID {
		return images.Image{}, fmt.Errorf("%w: image %q", images.ErrNotFound, ref)
	}
	return images.Image{
		ID: testImageID, RepoTags: []string{testImage}, RepoDigests: []string{testDigest}, Size: 1,
		Config: images.ImageConfig{Entrypoint: []string{"/bin/sleep"}, Cmd: []string{"1000"}, Env: []string{"IMAGE=yes"}, StopSignal: "SIGQUIT"},
	}, nil
}

func (f *fakeImages) MountRootfs(_ context.Context, id, _ string) (string, error) {
	if err := f.get("mount"); err != nil {
		return "", err
	}
	dir := filepath.Join(f.root, id)
	if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mounted[id] = true
	return dir, os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o644)
}

func (f *fakeImages) UnmountRootfs(id string) error {
	if err := f.get("unmount"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.mounted, id)
	return os.RemoveAll(filepath.Join(f.root, id))
}

func (f *fakeImages) RootfsUsage(ctx context.Context, id string) (images.Usage, error) {
	if err := f.get("usage"); err != nil {
		return images.Usage{}, err
	}
	if f.unmeasured {
		<-ctx.Done()
		return images.Usage{}, ctx.Err()
	}
	usage := images.Usage{At: time.Now().Add(-time.Second)}
	err := filepath.Walk(filepath.Join(f.root, id), func(_ string, st os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		usage.Bytes += uint64(st.Size())
		usage.Inodes++
		return nil
	})
	return usage, err
}

func (f *fakeImages) MountImageVolume(_ context.Context, owner, _, sub string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.volumes[owner] {
		return "", fmt.Errorf("%w: volume %s", images.ErrExists, owner)
	}
	if sub == missingSubPath {
		return "", fmt.Errorf("sub path %s: the image has no such path: %w", sub, images.ErrNotFound)
	}
	f.volumes[owner] = true
	dir := filepath.Join(f.root, "volume-"+owner, sub)
	return dir, os.MkdirAll(dir, 0o755)
}

func (f *fakeImages) UnmountImageVolume(owner string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.volumes, owner)
	return os.RemoveAll(filepath.Join(f.root, "volume-"+owner))
}

func (f *fakeImages) Reconcile(live map[string]bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, all := range []map[string]bool{f.mounted, f.volumes} {
		for id := range all {
			if !live[id] {
				delete(all, id)
			}
		}
	}
	return nil
}

// fakeCgroups keeps directories, and counts CPU time by the call. A container's process is the one whose id a test
// puts into pids.
type fakeCgroups struct {
	failures
	root   string
	absent bool // the node has none
	// counted is what Details answers; Stats answers its part of it. With nil there is CPU time only.
	counted *cgroupv2.Stats
	calls   atomic.Uint64
	pids    map[string][]int // by path
}

func (c *fakeCgroups) Usable() bool { return !c.absent }

func (c *fakeCgroups) MakePod(parent, podID string) (string, error) {
	if err := c.get("make"); err != nil {
		return "", err
	}
	if parent == "" {
		parent = "/pods"
	}
	if strings.Contains(parent, "..") || strings.ContainsAny(parent, "\n\x00") {
		return "", cgroupv2.ErrInvalidPath
	}
	path := filepath.Join(parent, "pod"+podID)
	return path, os.MkdirAll(filepath.Join(c.root, path), 0o755)
}

// SetCPUShares keeps the number in a file.
func (c *fakeCgroups) SetCPUShares(path string, shares uint64) error {
	if err := c.get("weigh"); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.root, path, "shares"), []byte(strconv.FormatUint(shares, 10)), 0o600)
}

func (c *fakeCgroups) RemovePod(path string) error { return os.RemoveAll(filepath.Join(c.root, path)) }

func (c *fakeCgroups) Details(path string) (cgroupv2.Stats, error) {
	if err := errors.Join(c.get("stats"), c.get("stats of "+path)); err != nil {
		return cgroupv2.Stats{}, err
	}
	if !strings.HasPrefix(path, "/pods/pod") {
		return cgroupv2.Stats{}, cgroupv2.ErrNotFound
	}
	cpu := c.calls.Add(1) * uint64(time.Second)
	if c.counted == nil {
		return cgroupv2.Stats{CPU: cgroupv2.CPU{Usage: &cpu}, CPUPressure: &cgroupv2.Pressure{}}, nil
	}
	st := *c.counted
	st.CPU.Usage = &cpu
	return st, nil
}

func (c *fakeCgroups) Stats(path string) (cgroupv2.Stats, error) {
	st, err := c.Details(path)
	st.IO, st.Tasks, st.TasksMax = nil, nil, nil
	return st, err
}

func (c *fakeCgroups) Processes(path string) ([]int, error) {
	if err := c.get("processes"); err != nil {
		return nil, err
	}
	var pids []int
	for p, list := range c.pids {
		if p == path || strings.HasPrefix(p, path+"/") {
			pids = append(pids, list...)
		}
	}
	return pids, nil
}

// pods returns the cgroups that are left.
func (c *fakeCgroups) pods() []string {
	left, _ := filepath.Glob(filepath.Join(c.root, "*", "pod*"))
	return left
}
