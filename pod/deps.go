package pod

import (
	"context"
	"net"
	"os"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/ctr"
	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/netslirp"
)

// Deps is what pod asks of its leaves. All methods may be called at the same time, unless said otherwise.
type Deps struct {
	Containers Containers // KeeperContainers(*ctr.Client)
	Network    Network    // *netslirp.Network
	Images     Images     // *images.Store
	Cgroups    Cgroups    // *cgroupv2.Tree
}

// Containers is the keeper, which alone is the parent of containers.
type Containers interface {
	Lifecycle
	Facts
	Stdio
}

// Lifecycle starts and ends containers. A call lasts as long as the kernel needs for it, some milliseconds.
type Lifecycle interface {
	// Create makes the container's init, blocked before its program. ctr.ErrExists for a known id.
	Create(ctx context.Context, req ctr.CreateRequest) (ctr.State, error)
	// Start lets the program of a created container run.
	Start(ctx context.Context, id string) (ctr.State, error)
	// Kill signals the first process, or with all every process. Nil where it is dead already.
	Kill(ctx context.Context, id string, sig syscall.Signal, all bool) error
	// Update puts other limits on the container's cgroup, all or none of them; what is nil stays as it is.
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	// Delete kills what lives, waits for it and forgets the container. Idempotent.
	Delete(ctx context.Context, id string) error
}

// Facts tells what is true of processes.
type Facts interface {
	List(ctx context.Context) ([]ctr.State, error)
	// Info carries the boot id: a new value is a new node, on which no earlier process lives.
	Info(ctx context.Context) (ctr.Info, error)
	// Events calls fn, never twice at once, for each event after since, until ctx ends or the keeper is lost.
	Events(ctx context.Context, since uint64, fn func(ctr.Event) error) error
}

// Stdio reaches the streams of containers. The files of a ctr.Streams belong to the callee from the call on.
type Stdio interface {
	// Exec returns once the process runs. The end of ctx kills every process of it, then as well as later.
	Exec(ctx context.Context, req ctr.ExecRequest) (Session, error)
	// Attach blocks until the container exits or ctx ends.
	Attach(ctx context.Context, id string, streams ctr.Streams) error
	Resize(ctx context.Context, id string, width, height uint16) error
	// ReopenLog goes on in a new file. logDir is that of the container's ctr.CreateRequest.
	ReopenLog(ctx context.Context, id, logDir string) error
}

// Session is one process that was executed in a container.
type Session interface {
	Console() *os.File // the terminal's master; nil without a TTY
	Wait(ctx context.Context) (exitCode int, err error)
	Close() error // kills what still runs; idempotent
}

// KeeperContainers makes the keeper's client fit the seam.
func KeeperContainers(client *ctr.Client) Containers { return keeperContainers{client} }

type keeperContainers struct{ *ctr.Client }

func (k keeperContainers) Exec(ctx context.Context, req ctr.ExecRequest) (Session, error) {
	session, err := k.Client.Exec(ctx, req)
	if err != nil {
		return nil, err // not a typed nil in an interface
	}
	return session, nil
}

// Network is the pods' network and the sockets that live in it.
type Network interface {
	Attacher
	NodeSockets
	// Usage is the traffic of each attached pod's default interface, by pod id, from one dump of the node's interfaces.
	Usage() (map[string]netslirp.Traffic, error)
	// Ready is nil while pods can be attached.
	Ready() error
	// Info says for people which driver serves and how.
	Info() map[string]string
}

// Attacher connects pods.
type Attacher interface {
	// Attach gives the namespace an interface, an address and its ports; it undoes itself on an error.
	Attach(ctx context.Context, req netslirp.AttachRequest) (netslirp.Attachment, error)
	// Detach takes everything back. Idempotent; netNS need not exist any more.
	Detach(ctx context.Context, podID, netNS string) error
	// Reconcile takes back what belongs to no pod of live. Only at start-up, before any Attach.
	Reconcile(ctx context.Context, live map[string]bool) error
	// SetPodCIDR counts for pods that are attached later.
	SetPodCIDR(cidr string) error
	// ResolvConf is the content of a resolv.conf; without servers it names the host's.
	ResolvConf(servers, searches, options []string) (string, error)
}

// NodeSockets makes sockets in other network namespaces.
type NodeSockets interface {
	DialPod(ctx context.Context, netNSPath, addr string) (net.Conn, error)
	ListenNode(addr string) (net.Listener, error)
}

// Images resolves images and gives their content to containers.
type Images interface {
	// Get finds by tag, digest, id or prefix of an id; images.ErrNotFound.
	Get(ref string) (images.Image, error)
	Rootfs
	// Reconcile drops the mounts of containers and volumes that are not in live. Only at start-up.
	Reconcile(live map[string]bool) error
}

// Rootfs mounts what containers see of images. The unmounts are idempotent.
type Rootfs interface {
	MountRootfs(ctx context.Context, containerID, imageID string) (string, error)
	UnmountRootfs(containerID string) error
	// RootfsUsage tells from memory what was measured last; until ctx ends it waits for what never was.
	RootfsUsage(ctx context.Context, containerID string) (images.Usage, error)
	// MountImageVolume: ownerID names one volume.
	MountImageVolume(ctx context.Context, ownerID, imageID, subPath string) (string, error)
	UnmountImageVolume(ownerID string) error
}

// Cgroups is the delegated subtree, where there is one.
type Cgroups interface {
	// Usable is false where no cgroup can be made; then nothing else is called.
	Usable() bool
	// MakePod returns the pod's cgroup as a path relative to the mount.
	MakePod(parent, podID string) (string, error)
	// SetCPUShares weighs the pod's cgroup among its neighbours; without a cpu controller it does nothing.
	SetCPUShares(path string, shares uint64) error
	// RemovePod kills what is in it and removes it. Idempotent.
	RemovePod(path string) error
	CgroupStats
}

// CgroupStats reads what the kernel counts. cgroupv2.ErrNotFound where there is no such cgroup, or no longer.
type CgroupStats interface {
	// Stats is what is asked for often, Details is all.
	Stats(path string) (cgroupv2.Stats, error)
	Details(path string) (cgroupv2.Stats, error)
	// Processes lists those in the cgroup and below it.
	Processes(path string) ([]int, error)
}
