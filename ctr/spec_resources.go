package ctr

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// resources sets the limits and the OOM killer's preference.
func (b *builder) resources() error {
	r := b.req.Container.GetLinux().GetResources()
	if r == nil {
		return nil
	}
	limits, sentences, err := BuildResources(r, b.req.Host, b.hasCgroup())
	if err != nil {
		return err
	}
	b.spec.Linux.Resources = limits
	b.sentences = append(b.sentences, sentences...)
	score, sentence, err := OOMScoreAdj(r, b.req.Host)
	if sentence != "" {
		b.note("%s", sentence)
	}
	b.spec.Process.OOMScoreAdj = score
	return err
}

// OOMScoreAdj returns what a process of the container starts with, nil for the runtime's own: 0 is "not specified"
// (CRI). It clamps: a process without CAP_SYS_RESOURCE in the first user namespace cannot go below its own value
// (proc(5)), and libcontainer fails the start on EACCES. The sentence says so where it did.
func OOMScoreAdj(r *runtimeapi.LinuxContainerResources, host Host) (score *int, sentence string, err error) {
	want := int(r.GetOomScoreAdj())
	if want < -1000 || want > 1000 {
		return nil, "", invalid("oom_score_adj %d is not between -1000 and 1000", want)
	}
	if want == 0 {
		return nil, "", nil
	}
	got := max(want, host.OOMScoreAdjMin)
	if got != want {
		sentence = fmt.Sprintf("oom_score_adj %d is raised to %d, that of the node: without root none can be lower", want, got)
	}
	return &got, sentence, nil
}

// BuildResources returns the limits that the host's controllers can enforce, nil where there is none, and a
// sentence for each controller that misses; policy "strict" makes that ErrUnsupported. cgroup tells whether the
// container has a cgroup at all.
func BuildResources(r *runtimeapi.LinuxContainerResources, host Host, cgroup bool) (*specs.LinuxResources, []string, error) {
	if err := CheckResources(r); err != nil {
		return nil, nil, err
	}
	a := &limitAdder{host: host, cgroup: cgroup, missing: map[string][]string{}}
	a.cpu(r)
	a.memory(r)
	a.hugepages(r)
	a.unified(r)
	sentences := a.sentences()
	if host.Strict && len(sentences) > 0 {
		return nil, nil, unsupported("policy strict refuses to leave out: %s", strings.Join(sentences, "; "))
	}
	if !a.any {
		return nil, sentences, nil
	}
	return &a.out, sentences, nil
}

// CheckResources refuses what libcontainer or the kernel would refuse later and less clearly.
func CheckResources(r *runtimeapi.LinuxContainerResources) error {
	mem, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	switch {
	case mem < -1 || swap < -1:
		return invalid("memory limit %d, swap limit %d: a limit is positive, 0 for unspecified or -1 for none", mem, swap)
	case swap > 0 && mem == 0:
		return invalid("memory_swap_limit_in_bytes %d without a memory limit: it counts memory and swap together", swap)
	case swap > 0 && mem > 0 && swap < mem:
		return invalid("memory_swap_limit_in_bytes %d is below the memory limit %d: it counts memory and swap together", swap, mem)
	case r.GetCpuShares() < 0 || r.GetCpuPeriod() < 0 || r.GetCpuQuota() < -1:
		return invalid("cpu shares %d, period %d, quota %d: none may be negative", r.GetCpuShares(), r.GetCpuPeriod(), r.GetCpuQuota())
	}
	for key := range r.GetUnified() {
		controller, _, found := strings.Cut(key, ".")
		if !found || controller == "" || strings.ContainsAny(key, "/\x00") {
			return invalid("unified resource %q is not CONTROLLER.PARAMETER", key)
		}
		if controller == "cgroup" && !strings.HasPrefix(key, "cgroup.max.") {
			return invalid("unified resource %q is the runtime's own", key)
		}
	}
	return nil
}

// limitAdder collects the limits that can be enforced, and by controller those that cannot.
type limitAdder struct {
	host    Host
	cgroup  bool
	out     specs.LinuxResources
	any     bool
	missing map[string][]string
}

// has tells whether the controller is in force; if not it remembers what was asked of it.
func (a *limitAdder) has(controller, format string, args ...any) bool {
	core := controller == "cgroup" // cgroup.max.*: part of every cgroup
	if a.cgroup && a.host.CgroupUsable && (core || a.host.Controllers[controller]) {
		a.any = true
		return true
	}
	a.missing[controller] = append(a.missing[controller], fmt.Sprintf(format, args...))
	return false
}

func (a *limitAdder) sentences() []string {
	var out []string
	for _, c := range slices.Sorted(maps.Keys(a.missing)) {
		why := "the controller " + c + " is not delegated to this node"
		if !a.cgroup || !a.host.CgroupUsable {
			why = "this node has no cgroups of its own"
			if a.host.CgroupUsable {
				why = "the container has no cgroup of its own: its runtime keeps a pod's containers in one sandbox"
			}
		}
		verb := "is"
		if len(a.missing[c]) > 1 {
			verb = "are"
		}
		out = append(out, fmt.Sprintf("%s %s not applied: %s", strings.Join(a.missing[c], ", "), verb, why))
	}
	return out
}

// minShares is what the kubelet sends for a container that requests no cpu; like a period without a quota, it
// limits nothing, and nothing is missed without it.
const minShares = 2

func (a *limitAdder) cpu(r *runtimeapi.LinuxContainerResources) {
	cpu := &specs.LinuxCPU{}
	inForce := a.host.Controllers["cpu"]
	if s := uint64(r.GetCpuShares()); s > 0 && (inForce || s > minShares) && a.has("cpu", "cpu shares %d", s) {
		cpu.Shares = &s
	}
	if q := r.GetCpuQuota(); q != 0 && (inForce || q > 0) && a.has("cpu", "cpu quota %d us", q) {
		cpu.Quota = &q
	}
	if p := uint64(r.GetCpuPeriod()); p > 0 && (inForce || r.GetCpuQuota() > 0) && a.has("cpu", "cpu period %d us", p) {
		cpu.Period = &p
	}
	if s := r.GetCpusetCpus(); s != "" && a.has("cpuset", "cpuset cpus %s", s) {
		cpu.Cpus = s
	}
	if s := r.GetCpusetMems(); s != "" && a.has("cpuset", "cpuset mems %s", s) {
		cpu.Mems = s
	}
	if *cpu != (specs.LinuxCPU{}) {
		a.out.CPU = cpu
	}
}

func (a *limitAdder) memory(r *runtimeapi.LinuxContainerResources) {
	mem := &specs.LinuxMemory{}
	inForce := a.host.Controllers["memory"]
	if m := r.GetMemoryLimitInBytes(); m != 0 && (inForce || m > 0) && a.has("memory", "memory limit %d bytes", m) {
		mem.Limit = &m
	}
	if s := r.GetMemorySwapLimitInBytes(); s != 0 && (inForce || s > 0) && a.has("memory", "memory and swap limit %d bytes", s) {
		mem.Swap = &s
	}
	if _, own := r.GetUnified()["memory.swap.max"]; mem.Limit != nil && *mem.Limit > 0 && mem.Swap == nil && !own {
		// Without a word on swap a limit is one, as with the other runtimes of the CRI: what is over it is killed, not swapped.
		mem.Swap = mem.Limit
	}
	if *mem != (specs.LinuxMemory{}) {
		a.out.Memory = mem
	}
}

func (a *limitAdder) hugepages(r *runtimeapi.LinuxContainerResources) {
	for _, h := range r.GetHugepageLimits() {
		// The kubelet sends 0 for each page size that a container does not ask for: nothing is missed without it.
		if h.GetLimit() == 0 && !a.host.Controllers["hugetlb"] {
			continue
		}
		if a.has("hugetlb", "hugepages %s limit %d bytes", h.GetPageSize(), h.GetLimit()) {
			a.out.HugepageLimits = append(a.out.HugepageLimits,
				specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
		}
	}
}

// unified passes raw cgroup v2 settings: io.max, memory.high, pids.max.
func (a *limitAdder) unified(r *runtimeapi.LinuxContainerResources) {
	for _, key := range slices.Sorted(maps.Keys(r.GetUnified())) {
		controller, _, _ := strings.Cut(key, ".")
		if !a.host.Controllers[controller] && limitsNothing(key, r.GetUnified()[key]) {
			continue
		}
		if !a.has(controller, "%s=%s", key, r.GetUnified()[key]) {
			continue
		}
		if a.out.Unified == nil {
			a.out.Unified = map[string]string{}
		}
		a.out.Unified[key] = r.GetUnified()[key]
	}
}

// limitsNothing: the kubelet sends memory.oom.group, which says how a limit is enforced, and protections of 0 for every
// container; without the controller nothing is missed.
func limitsNothing(key, value string) bool {
	switch key {
	case "memory.oom.group":
		return true
	case "memory.min", "memory.low":
		return value == "0"
	}
	return value == "max"
}
