package netslirp

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"

	"github.com/coracle-cri/coracle/e2e/crash"
)

// podInterface is the name of a pod's interface, as every CNI runtime names it.
const podInterface = "eth0"

// pool gives out the addresses of one pod CIDR, round robin, so that an address rests as long as it can.
type pool struct {
	prefix  netip.Prefix
	gateway netip.Addr
	alloc   *allocator.IPAllocator
	ledger  *ledger
}

func newPools(prefixes []netip.Prefix, l *ledger) ([]*pool, error) {
	var out []*pool
	for _, prefix := range prefixes {
		p, err := newPool(prefix, l)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func newPool(prefix netip.Prefix, l *ledger) (*pool, error) {
	set := allocator.RangeSet{{Subnet: types.IPNet(*ipNet(prefix))}}
	if err := set.Canonicalize(); err != nil {
		return nil, fmt.Errorf("pod CIDR %s: %w: %w", prefix, ErrInvalid, err)
	}
	id := 0 // under which the store remembers the last address given
	if familyOf(prefix.Addr()) == ipv6 {
		id = 1
	}
	return &pool{prefix: prefix, gateway: gatewayOf(prefix), alloc: allocator.NewIPAllocator(&set, l, id), ledger: l}, nil
}

// gatewayOf is the network's first address, which the allocator leaves out.
func gatewayOf(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// take reserves an address for the pod on disk.
func (p *pool) take(podID string) (netip.Prefix, error) {
	got, err := p.alloc.Get(podID, podInterface, nil)
	if err != nil {
		if strings.HasPrefix(err.Error(), "no IP addresses available") { // host-local has no type for it
			return netip.Prefix{}, fmt.Errorf("take an address of %s, all %d are in use: %w", p.prefix, p.ledger.count(p.prefix), ErrNoAddress)
		}
		return netip.Prefix{}, fmt.Errorf("take an address of %s: %w", p.prefix, err)
	}
	return netip.PrefixFrom(addrOf(got.Address.IP), p.prefix.Bits()), nil
}

func addrOf(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}

// ledger is host-local's disk store with what it lacks for use in one long-lived process. Its file lock does not
// exclude two goroutines, which share the open file; and it reads every file of the store to find a pod's address.
type ledger struct {
	disk *disk.Store
	dir  string

	mu   sync.Mutex          // held between Lock and Unlock, and by the methods below that say so
	held map[string][]net.IP // pod id → its addresses on disk
}

var _ backend.Store = (*ledger)(nil)

// openLedger reads the store, sweeps an address whose owner a crash kept from being written, and sets aside what is no
// file or names nobody.
func openLedger(dataDir string, log *slog.Logger) (*ledger, error) {
	const network = "ipam"
	l := &ledger{dir: filepath.Join(dataDir, network), held: map[string][]net.IP{}}
	if err := makeDir(l.dir, log); err != nil {
		return nil, err
	}
	if err := l.load(log); err != nil {
		return nil, err
	}
	// The library would make it for others to read.
	if lock, err := os.OpenFile(filepath.Join(l.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("make lock of address store: %w", err)
	} else if err := lock.Close(); err != nil {
		return nil, fmt.Errorf("make lock of address store: %w", err)
	}
	var err error
	if l.disk, err = disk.New(network, dataDir); err != nil {
		return nil, fmt.Errorf("open address store: %w", err)
	}
	return l, nil
}

func (l *ledger) load(log *slog.Logger) error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("read address store: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(l.dir, e.Name())
		if !e.Type().IsRegular() && !strings.HasSuffix(e.Name(), unreadable) {
			setAside(path, errors.New("it is no file"), log)
			continue
		}
		ip := net.ParseIP(e.Name())
		if ip == nil {
			continue // the lock, and the last address of each range
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			setAside(path, err, log)
			continue
		}
		owner, _, _ := strings.Cut(strings.TrimSpace(string(raw)), disk.LineBreak)
		if owner == "" {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("sweep address store: %w", err)
			}
			continue
		}
		if !podIDForm.MatchString(owner) {
			setAside(path, fmt.Errorf("%.40q is no pod", owner), log)
			continue
		}
		l.held[owner] = append(l.held[owner], ip)
	}
	return nil
}

// Lock excludes other goroutines and other processes. The allocator calls it, and ignores its error.
func (l *ledger) Lock() error {
	l.mu.Lock()
	return l.disk.Lock()
}

// Unlock undoes Lock.
func (l *ledger) Unlock() error {
	defer l.mu.Unlock()
	return l.disk.Unlock()
}

// Close closes the lock file.
func (l *ledger) Close() error { return l.disk.Close() }

// Reserve is called by the allocator between Lock and Unlock.
func (l *ledger) Reserve(id, ifname string, ip net.IP, rangeID string) (bool, error) {
	ok, err := l.disk.Reserve(id, ifname, ip, rangeID)
	if ok && err == nil {
		crash.Point("net/address-reserved")
		l.held[id] = append(l.held[id], ip)
	}
	return ok, err
}

// LastReservedIP is called by the allocator between Lock and Unlock.
func (l *ledger) LastReservedIP(rangeID string) (net.IP, error) {
	return l.disk.LastReservedIP(rangeID)
}

// ReleaseByID is called by the allocator, or by release, between Lock and Unlock.
func (l *ledger) ReleaseByID(id, _ string) error {
	for _, ip := range slices.Clone(l.held[id]) {
		if err := l.dropLocked(id, ip); err != nil {
			return err
		}
	}
	return nil
}

func (l *ledger) dropLocked(id string, ip net.IP) error {
	path := disk.GetEscapedPath(l.dir, ip.String())
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release address: %w", err)
	}
	crash.Point("net/address-released")
	l.held[id] = slices.DeleteFunc(l.held[id], ip.Equal)
	if len(l.held[id]) == 0 {
		delete(l.held, id)
	}
	return nil
}

// GetByID is called by the allocator between Lock and Unlock.
func (l *ledger) GetByID(id, _ string) []net.IP { return slices.Clone(l.held[id]) }

// release gives back every address of the pod. It is idempotent.
func (l *ledger) release(podID string) (err error) {
	if err := l.Lock(); err != nil {
		return errors.Join(fmt.Errorf("lock address store: %w", err), l.Unlock())
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	return l.ReleaseByID(podID, podInterface)
}

// drop gives back one address of the pod.
func (l *ledger) drop(podID string, addr netip.Addr) (err error) {
	if err := l.Lock(); err != nil {
		return errors.Join(fmt.Errorf("lock address store: %w", err), l.Unlock())
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	return l.dropLocked(podID, net.IP(addr.AsSlice()))
}

// ensure reserves what a record says its pod has, where the store lost it, or says that somebody has it of whom nothing
// else is known: an address must never be given twice.
func (l *ledger) ensure(r *record, known func(podID string) bool) (err error) {
	if err := l.Lock(); err != nil {
		return errors.Join(fmt.Errorf("lock address store: %w", err), l.Unlock())
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	for _, a := range r.Addresses {
		addr := a.Addr()
		ip := net.IP(addr.AsSlice())
		if slices.ContainsFunc(l.held[r.PodID], ip.Equal) {
			continue
		}
		for owner, ips := range l.held {
			if slices.ContainsFunc(ips, ip.Equal) && !known(owner) {
				if err := l.dropLocked(owner, ip); err != nil {
					return err
				}
			}
		}
		ok, err := l.Reserve(r.PodID, podInterface, ip, "0")
		if err != nil {
			return fmt.Errorf("reserve %s again: %w", addr, err)
		}
		if !ok {
			return fmt.Errorf("address %s of pod %s belongs to another pod too: %w", addr, r.PodID, ErrInvalid)
		}
	}
	return nil
}

// owners lists the pods that hold an address.
func (l *ledger) owners() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids := make([]string, 0, len(l.held))
	for id := range l.held {
		ids = append(ids, id)
	}
	return ids
}

// addresses lists what the pod holds, IPv4 first.
func (l *ledger) addresses(podID string) []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []netip.Addr
	for _, ip := range l.held[podID] {
		out = append(out, addrOf(ip))
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func (l *ledger) count(prefix netip.Prefix) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, ips := range l.held {
		for _, ip := range ips {
			if prefix.Contains(addrOf(ip)) {
				n++
			}
		}
	}
	return n
}
