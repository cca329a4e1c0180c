package pod

import (
	"strconv"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/coracle-cri/coracle/cgroupv2"
	"github.com/coracle-cri/coracle/netslirp"
)

// family is one metric name: what is told of it, and how its values are found in the facts.
type family struct {
	name, help string
	kind       runtimeapi.MetricType
	keys       []string // labels beside labelKeys
	read       func(*facts, put)
	// at is when the values were found out, where that may have been before the call; zero and nil are now.
	at func(*facts) time.Time
}

// put takes one value, with the values of the family's keys. A value that is nil nobody counts, and it is left out.
type put func(value *uint64, labels ...string)

// families are all metrics, in the order in which they are told.
var families = []family{
	gauge("container_last_seen", "When the container was last seen running, in seconds since 1970.",
		func(f *facts) *uint64 { return unixSeconds(f.at) }),
	gauge("container_start_time_seconds", "When the container was started, in seconds since 1970.",
		func(f *facts) *uint64 { return unixSeconds(f.startedAt) }),

	// cpu.stat; what is about periods needs the cpu controller.
	counter("container_cpu_usage_seconds_total", "CPU time used, in seconds.",
		func(f *facts) *uint64 { return wholeSeconds(f.stats.CPU.Usage) }, "cpu", "total"),
	counter("container_cpu_user_seconds_total", "CPU time used outside of the kernel, in seconds.",
		func(f *facts) *uint64 { return wholeSeconds(f.stats.CPU.User) }),
	counter("container_cpu_system_seconds_total", "CPU time used in the kernel, in seconds.",
		func(f *facts) *uint64 { return wholeSeconds(f.stats.CPU.System) }),
	counter("container_cpu_cfs_periods_total", "Periods of the CPU quota that have passed.",
		func(f *facts) *uint64 { return f.stats.CPU.Periods }),
	counter("container_cpu_cfs_throttled_periods_total", "Periods in which the CPU quota was used up.",
		func(f *facts) *uint64 { return f.stats.CPU.Throttled }),
	counter("container_cpu_cfs_throttled_seconds_total", "Time for which a CPU quota that was used up stopped threads, in seconds.",
		func(f *facts) *uint64 { return wholeSeconds(f.stats.CPU.ThrottledTime) }),

	// The memory controller; without it, working set and RSS are estimates (census.go).
	gauge("container_memory_usage_bytes", "Memory in use, with all of the page cache.",
		func(f *facts) *uint64 { return f.stats.Memory.Usage }),
	gauge("container_memory_max_usage_bytes", "The most memory that was ever in use.",
		func(f *facts) *uint64 { return f.stats.Memory.Peak }),
	estimated(gauge("container_memory_working_set_bytes", "Memory in use, less page cache that was not used lately.",
		func(f *facts) *uint64 { return f.stats.Memory.WorkingSet })),
	estimated(gauge("container_memory_rss", "Anonymous memory, in bytes.",
		func(f *facts) *uint64 { return f.stats.Memory.RSS })),
	gauge("container_memory_cache", "Page cache, in bytes.",
		func(f *facts) *uint64 { return f.stats.Memory.Cache }),
	gauge("container_memory_mapped_file", "Files that are mapped into memory, in bytes.",
		func(f *facts) *uint64 { return f.stats.Memory.MappedFile }),
	gauge("container_memory_total_active_file_bytes", "Page cache that was used lately.",
		func(f *facts) *uint64 { return f.stats.Memory.ActiveFile }),
	gauge("container_memory_total_inactive_file_bytes", "Page cache that was not used lately.",
		func(f *facts) *uint64 { return f.stats.Memory.InactiveFile }),
	gauge("container_memory_kernel_usage", "Memory that the kernel holds for the container, in bytes.",
		func(f *facts) *uint64 { return f.stats.Memory.Kernel }),
	gauge("container_memory_swap", "Swap in use, in bytes.",
		func(f *facts) *uint64 { return f.stats.Memory.Swap }),
	counter("container_memory_failcnt", "How often the memory limit was reached.",
		func(f *facts) *uint64 { return f.stats.Memory.LimitHits }),
	{name: "container_memory_failures_total", help: "Page faults, by kind.", kind: runtimeapi.MetricType_COUNTER,
		keys: []string{"failure_type", "scope"}, read: readFaults},
	counter("container_oom_events_total", "Processes that the kernel killed for want of memory.",
		func(f *facts) *uint64 { return f.stats.Memory.OOMKills }),

	// The writable layer and the filesystem that it is on.
	{name: "container_fs_usage_bytes", help: "What the container has written to its root filesystem, in bytes.",
		kind: runtimeapi.MetricType_GAUGE, keys: []string{"device"}, read: readLayer, at: (*facts).layerAt},
	ofDisk("container_fs_limit_bytes", "Size of the filesystem that the writable layer is on, in bytes.",
		func(d *disk) *uint64 { return &d.bytes }),
	ofDisk("container_fs_inodes_total", "Inodes of the filesystem that the writable layer is on.",
		func(d *disk) *uint64 { return &d.inodes }),
	ofDisk("container_fs_inodes_free", "Free inodes of the filesystem that the writable layer is on.",
		func(d *disk) *uint64 { return &d.inodesFree }),

	// The io controller.
	perDevice("container_fs_reads_bytes_total", "Bytes read from a block device.",
		func(d *cgroupv2.DeviceIO) *uint64 { return &d.ReadBytes }),
	perDevice("container_fs_reads_total", "Reads from a block device.",
		func(d *cgroupv2.DeviceIO) *uint64 { return &d.Reads }),
	perDevice("container_fs_writes_bytes_total", "Bytes written to a block device.",
		func(d *cgroupv2.DeviceIO) *uint64 { return &d.WriteBytes }),
	perDevice("container_fs_writes_total", "Writes to a block device.",
		func(d *cgroupv2.DeviceIO) *uint64 { return &d.Writes }),
	{name: "container_blkio_device_usage_total", help: "Bytes that went between the container and a block device, by operation.",
		kind: runtimeapi.MetricType_COUNTER, keys: []string{"device", "major", "minor", "operation"}, read: readBlkio},

	// The pod's interface.
	ofInterface("container_network_receive_bytes_total", "Bytes received.",
		func(t *netslirp.Traffic) *uint64 { return &t.RxBytes }),
	ofInterface("container_network_receive_packets_total", "Packets received.",
		func(t *netslirp.Traffic) *uint64 { return &t.RxPackets }),
	ofInterface("container_network_receive_packets_dropped_total", "Packets dropped when they were received.",
		func(t *netslirp.Traffic) *uint64 { return &t.RxDropped }),
	ofInterface("container_network_receive_errors_total", "Errors of reception.",
		func(t *netslirp.Traffic) *uint64 { return &t.RxErrors }),
	ofInterface("container_network_transmit_bytes_total", "Bytes sent.",
		func(t *netslirp.Traffic) *uint64 { return &t.TxBytes }),
	ofInterface("container_network_transmit_packets_total", "Packets sent.",
		func(t *netslirp.Traffic) *uint64 { return &t.TxPackets }),
	ofInterface("container_network_transmit_packets_dropped_total", "Packets dropped when they were to be sent.",
		func(t *netslirp.Traffic) *uint64 { return &t.TxDropped }),
	ofInterface("container_network_transmit_errors_total", "Errors of sending.",
		func(t *netslirp.Traffic) *uint64 { return &t.TxErrors }),

	gauge("container_processes", "Processes of the container.",
		func(f *facts) *uint64 { return f.processes.count }),
	gauge("container_threads", "Threads of the container.",
		func(f *facts) *uint64 { return f.processes.threads }),
	gauge("container_threads_max", "The most threads that the container may have; 0 where there is no limit.",
		func(f *facts) *uint64 { return orNone(f.stats.TasksMax, f.stats.Tasks) }),
	gauge("container_file_descriptors", "Open files of all processes of the container.",
		func(f *facts) *uint64 { return f.processes.files }),
	gauge("container_sockets", "Open sockets of all processes of the container.",
		func(f *facts) *uint64 { return f.processes.sockets }),
	gauge("container_ulimits_soft", "Soft resource limit of the container's first process.",
		func(f *facts) *uint64 { return f.processes.maxFiles }, "ulimit", "max_open_files"),

	// Limits that are in force. Those of memory are read back from the kernel, where 0 is none.
	gauge("container_spec_cpu_period", "Period of the CPU quota, in microseconds.",
		func(f *facts) *uint64 { return limit(f.limits.GetCpuPeriod()) }),
	gauge("container_spec_cpu_quota", "CPU time that the container may use in a period, in microseconds.",
		func(f *facts) *uint64 { return limit(f.limits.GetCpuQuota()) }),
	gauge("container_spec_cpu_shares", "Share of the CPU beside other containers.",
		func(f *facts) *uint64 { return limit(f.limits.GetCpuShares()) }),
	gauge("container_spec_memory_limit_bytes", "The most memory that the container may use; 0 where there is no limit.",
		func(f *facts) *uint64 { return orNone(f.stats.Memory.Limit, f.stats.Memory.Usage) }),
	gauge("container_spec_memory_swap_limit_bytes", "The most swap that the container may use; 0 where there is no limit.",
		func(f *facts) *uint64 { return orNone(f.stats.Memory.SwapLimit, f.stats.Memory.Swap) }),
	gauge("container_spec_memory_reservation_limit_bytes", "Memory that is kept for the container.",
		func(f *facts) *uint64 { return f.stats.Memory.Min }),

	// Pressure stall records.
	counter("container_pressure_cpu_waiting_seconds_total", "Time in which a thread waited for a CPU, in seconds.",
		func(f *facts) *uint64 { return some(f.stats.CPUPressure) }),
	counter("container_pressure_cpu_stalled_seconds_total", "Time in which all threads waited for a CPU, in seconds.",
		func(f *facts) *uint64 { return full(f.stats.CPUPressure) }),
	counter("container_pressure_memory_waiting_seconds_total", "Time in which a thread waited for memory, in seconds.",
		func(f *facts) *uint64 { return some(f.stats.MemoryPressure) }),
	counter("container_pressure_memory_stalled_seconds_total", "Time in which all threads waited for memory, in seconds.",
		func(f *facts) *uint64 { return full(f.stats.MemoryPressure) }),
	counter("container_pressure_io_waiting_seconds_total", "Time in which a thread waited for a disk, in seconds.",
		func(f *facts) *uint64 { return some(f.stats.IOPressure) }),
	counter("container_pressure_io_stalled_seconds_total", "Time in which all threads waited for a disk, in seconds.",
		func(f *facts) *uint64 { return full(f.stats.IOPressure) }),
}

// scalar has one value, with one more label where key and label are given.
func scalar(name, help string, value func(*facts) *uint64, label []string) family {
	f := family{name: name, help: help}
	if len(label) == 2 {
		f.keys, label = label[:1], label[1:]
	}
	f.read = func(facts *facts, put put) { put(value(facts), label...) }
	return f
}

func gauge(name, help string, value func(*facts) *uint64, label ...string) family {
	f := scalar(name, help, value, label)
	f.kind = runtimeapi.MetricType_GAUGE
	return f
}

func counter(name, help string, value func(*facts) *uint64, label ...string) family {
	f := scalar(name, help, value, label)
	f.kind = runtimeapi.MetricType_COUNTER
	return f
}

// estimated marks what may be an estimate of some time ago.
func estimated(f family) family {
	f.at = func(facts *facts) time.Time { return facts.memoryAt }
	return f
}

func ofDisk(name, help string, value func(*disk) *uint64) family {
	return family{name: name, help: help, kind: runtimeapi.MetricType_GAUGE, keys: []string{"device"}, read: func(f *facts, put put) {
		if f.disk != nil {
			put(value(f.disk), f.disk.device)
		}
	}}
}

func perDevice(name, help string, value func(*cgroupv2.DeviceIO) *uint64) family {
	return family{name: name, help: help, kind: runtimeapi.MetricType_COUNTER, keys: []string{"device"}, read: func(f *facts, put put) {
		for i := range f.stats.IO {
			d := &f.stats.IO[i]
			put(value(d), f.deviceOf(d.Major, d.Minor))
		}
	}}
}

func ofInterface(name, help string, value func(*netslirp.Traffic) *uint64) family {
	return family{name: name, help: help, kind: runtimeapi.MetricType_COUNTER, keys: []string{"interface"}, read: func(f *facts, put put) {
		if f.traffic != nil {
			put(value(f.traffic), f.traffic.Name)
		}
	}}
}

// readFaults tells the same of both scopes, as cAdvisor does: cgroup v2 counts what is below a cgroup with it.
func readFaults(f *facts, put put) {
	for _, scope := range []string{"container", "hierarchy"} {
		put(f.stats.Memory.Faults, "pgfault", scope)
		put(f.stats.Memory.MajorFaults, "pgmajfault", scope)
	}
}

func (f *facts) layerAt() time.Time {
	if f.layer == nil {
		return time.Time{}
	}
	return f.layer.At
}

func readLayer(f *facts, put put) {
	if f.disk != nil && f.layer != nil {
		put(&f.layer.Bytes, f.disk.device)
	}
}

func readBlkio(f *facts, put put) {
	for _, d := range f.stats.IO {
		device := f.deviceOf(d.Major, d.Minor)
		major, minor := strconv.FormatUint(uint64(d.Major), 10), strconv.FormatUint(uint64(d.Minor), 10)
		put(&d.ReadBytes, device, major, minor, "Read")
		put(&d.WriteBytes, device, major, minor, "Write")
		put(&d.DiscardBytes, device, major, minor, "Discard")
	}
}

// wholeSeconds rounds down, so that a counter never is ahead of the time.
func wholeSeconds(nanos *uint64) *uint64 {
	if nanos == nil {
		return nil
	}
	s := *nanos / uint64(time.Second)
	return &s
}

func unixSeconds(t time.Time) *uint64 {
	if t.IsZero() {
		return nil
	}
	s := uint64(t.Unix())
	return &s
}

func some(p *cgroupv2.Pressure) *uint64 {
	if p == nil {
		return nil
	}
	return wholeSeconds(&p.Some.TotalNanos)
}

func full(p *cgroupv2.Pressure) *uint64 {
	if p == nil {
		return nil
	}
	return wholeSeconds(&p.Full.TotalNanos)
}

// orNone is zero for a limit that is not there, where the thing itself is counted.
func orNone(limit, counted *uint64) *uint64 {
	if limit == nil && counted != nil {
		limit = new(uint64)
	}
	return limit
}

// limit is nil for one that is not in force.
func limit(n int64) *uint64 {
	if n <= 0 {
		return nil
	}
	u := uint64(n)
	return &u
}
